"""The keyword arguments of a forward pass, under the names that the installed transformers gives them."""

from typing import Any

from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

# transformers 5.24 renamed the cache everywhere. CACHE is what the installed library calls it, in the arguments of its
# modules and masks and in its outputs; OTHER_CACHE is what it calls it in the other releases.
CACHE, OTHER_CACHE = (
    ("cache", "past_key_values")
    if "cache" in BaseModelOutputWithPast.__dataclass_fields__
    else ("past_key_values", "cache")
)


def cache_keyword(cache: Cache | None) -> dict[str, Any]:
    """The cache as a keyword argument of the library's modules, masks and outputs."""
    return {CACHE: cache}


def one_cache(past_key_values: Cache | None, cache: Cache | None) -> Cache | None:
    """The cache, given under either name.

    Raises:
        ValueError: given under both.
    """
    if past_key_values is not None and cache is not None:
        raise ValueError("forward: past_key_values and cache are two names of one argument; give one of them")
    return cache if past_key_values is None else past_key_values

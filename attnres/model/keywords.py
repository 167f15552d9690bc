"""The keyword arguments of a forward pass: each is obeyed, or refused by its name; none is swallowed."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import TransformersKwargs

from attnres.config import nearest

# transformers 5.24 renamed the cache everywhere. CACHE is what the installed library calls it, in the arguments of its
# modules and masks and in its outputs; OTHER_CACHE is what it calls it in the other releases.
CACHE, OTHER_CACHE = (
    ("cache", "past_key_values")
    if "cache" in BaseModelOutputWithPast.__dataclass_fields__
    else ("past_key_values", "cache")
)

# Obeyed by flash attention alone.
FLASH = frozenset({"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"})
# Known words that the decoder cannot obey, with the reason.
REFUSED = {
    "cache_position": "tokens follow those of the cache; another place is not supported",
    "is_causal": "the decoder is causal",
    "num_items_in_batch": "the decoder computes no loss",
    "output_router_logits": "there are no experts",
    "seq_idx": "separate packed documents by position_ids that restart",
    "shift_labels": "the decoder computes no loss",
    "token_type_ids": "there is one type of token, 0",
} | dict.fromkeys(FLASH, "only flash attention takes it; separate packed documents by position_ids that restart")


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


def attention_arguments(
    given: Mapping[str, Any], signatures: Callable[[], Iterable[str]], implementation: str | None, cache: Cache | None
) -> dict[str, Any]:
    """What the attention function gets of the keyword arguments that no signature names.

    Args:
        given: those arguments. None and False ask for nothing.
        signatures: gives the names that the forward passes of the model take, for the suggestion.
        implementation: of attention, as the configuration names it.

    Raises:
        TypeError: a word that neither we nor the installed library know, with the nearest known one.
        ValueError: a known word that is not supported.
    """
    if type(cache).__name__ == "PagedAttentionCache":
        # The library's own batches of requests: it speaks to its attention functions, through the model.
        return dict(given)
    passed = {}
    for name, value in given.items():
        if name not in REFUSED and name not in TransformersKwargs.__annotations__:
            guess = nearest(name, {*signatures(), *TransformersKwargs.__annotations__, *REFUSED} - {"self", name})
            raise TypeError(f"forward: unknown argument {name!r}" + (f"; did you mean {guess!r}?" if guess else ""))
        if name in FLASH and "flash" in (implementation or ""):
            passed[name] = value
        elif not _asks_for_nothing(name, value, cache):
            raise ValueError(f"forward: {name} is not supported: {REFUSED.get(name, 'it is new in transformers')}")
    return passed


def _asks_for_nothing(name: str, value: Any, cache: Cache | None) -> bool:
    if name == "is_causal":
        return value is None or bool(value)
    if name == "token_type_ids" and isinstance(value, torch.Tensor):
        return not bool(value.any())
    if name == "cache_position" and isinstance(value, torch.Tensor):
        first = 0 if cache is None else int(cache.get_seq_length())
        return value.tolist() == list(range(first, first + len(value)))
    return value is None or value is False

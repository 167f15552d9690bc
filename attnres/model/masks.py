"""Which tokens attend to which: to none behind them, to no padding, and never across packed documents."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.utils.import_utils import is_tracing

from attnres.model.keywords import cache_keyword

# Set on a cache that holds more than one document of a row.
_PACKED = "_attnres_packed"


def attention_mask_for(
    config: PreTrainedConfig,
    inputs_embeds: Tensor,
    attention_mask: Any,
    position_ids: Tensor | None,
    cache: Cache | None,
) -> Any:
    """The library's causal mask, in which packed documents are separated whatever mask and cache they come with.

    The library looks for documents only where there is neither mask nor cache. A document begins where the position of
    a token does not exceed that of the token before it, padding left aside: generation gives padding positions of its
    own. Behind a filled cache, position 0 begins one.

    Args:
        attention_mask: `[B, T]`, 0 for padding, with the cached tokens in front; or one that is made already,
            `[B, 1, T, S]`, bool or to be added; or those, by kind of layer.
        position_ids: `[B, T]` or `[1, T]`.

    Returns:
        What the attention function of the configuration takes.

    Raises:
        ValueError: documents that the cache or the attention function cannot keep apart.
    """
    documents = None
    if isinstance(attention_mask, dict):
        # Generation with a static cache makes a mask for each kind of layer; there is one kind here.
        attention_mask = attention_mask["full_attention"]
    made = isinstance(attention_mask, Tensor) and attention_mask.ndim == 4
    if made and attention_mask.dtype == torch.bool and config._attn_implementation == "eager":
        # The eager function would add True and False to its scores.
        hidden, dtype = ~attention_mask, inputs_embeds.dtype
        attention_mask = hidden.new_zeros(hidden.shape, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min)
    # The library's own batches of requests come with their mask.
    if position_ids is not None and type(cache).__name__ != "PagedAttentionCache":
        documents = _documents(inputs_embeds, attention_mask, position_ids, cache)
    arguments = {"config": config, "inputs_embeds": inputs_embeds, "attention_mask": attention_mask}
    if documents is None:
        return create_causal_mask(**arguments, **cache_keyword(cache))
    own, all_keys = documents
    if "flash" in (config._attn_implementation or ""):
        _check_flash(attention_mask, position_ids, own, cache)
        return create_causal_mask(**arguments, **cache_keyword(cache))
    if attention_mask is None or attention_mask.ndim == 2:
        return create_causal_mask(
            **arguments,
            **cache_keyword(cache),
            and_mask_function=lambda row, head, query, key: all_keys[row, query] == all_keys[row, key],
        )
    if not isinstance(attention_mask, Tensor):
        raise ValueError(f"position_ids: packed documents cannot be separated in a {type(attention_mask).__name__}")
    same = own[:, None, :, None] == all_keys[:, None, None, :]
    if attention_mask.dtype == torch.bool:
        return attention_mask & same
    return attention_mask.masked_fill(~same, torch.finfo(attention_mask.dtype).min)


def _documents(
    inputs_embeds: Tensor, attention_mask: Any, position_ids: Tensor, cache: Cache | None
) -> tuple[Tensor, Tensor] | None:
    """The document of each token `[B, T]` and of each key `[B, S]`, 0 for what the cache holds; None for a single one.

    A traced pass cannot look at positions: it is given documents always, but for a single token.
    """
    batch, tokens = inputs_embeds.shape[:2]
    seen = 0 if cache is None else cache.get_seq_length()
    keys = tokens if cache is None else cache.get_mask_sizes(tokens, 0)[0]
    index = torch.arange(tokens, device=inputs_embeds.device)
    positions = position_ids.to(index.device).expand(batch, -1)
    real = behind = torch.ones_like(positions, dtype=torch.bool)
    if isinstance(attention_mask, Tensor):
        keys = max(keys, attention_mask.shape[-1])
        if attention_mask.ndim == 2:
            not_padding = attention_mask.to(index.device).bool()
            real, behind = not_padding[:, -tokens:], not_padding[:, :-tokens].any(dim=1, keepdim=True)
        else:
            shown = attention_mask[:, 0].expand(batch, -1, -1)
            shown = shown if shown.dtype == torch.bool else shown >= 0
            # Padding is hidden from itself, too.
            real = shown.gather(-1, (seen + index)[None, :, None].expand(batch, -1, 1)).squeeze(-1)
            behind = (shown & (torch.arange(keys, device=index.device) < seen)).any(dim=-1)
    last = torch.where(real, index, -1).cummax(dim=1).values
    before = F.pad(last[:, :-1], (1, 0), value=-1)
    restarts = (before >= 0) & (positions <= positions.gather(1, before.clamp(min=0)))
    restarts |= (before < 0) & (positions == 0) & (seen > 0) & behind
    own = (real & restarts).cumsum(dim=1)
    if is_tracing(own):
        if tokens == 1:
            return None
    else:
        packed = bool(own.any())
        if cache is not None:
            if getattr(cache, _PACKED, False) and int(seen) and bool((real & (own == 0)).any()):
                raise ValueError(
                    "position_ids: the cache holds packed documents, and which of them a token continues is unknown; "
                    "give each document its own row, or set use_cache=False"
                )
            setattr(cache, _PACKED, packed or (bool(int(seen)) and getattr(cache, _PACKED, False)))
        if not packed:
            return None
    return own, own.new_zeros(batch, keys).scatter(1, (seen + index).expand(batch, -1), own)


def _check_flash(attention_mask: Any, position_ids: Any, own: Tensor, cache: Cache | None) -> None:
    """Flash attention separates documents itself, by position 0, in a single row without padding or cached tokens."""
    starts = F.pad(own, (1, 0), value=-1).diff(dim=1) > 0
    padded = attention_mask is not None and not bool(attention_mask.all())
    filled = cache is not None and cache.get_seq_length() > 0
    if len(own) > 1 or padded or filled or bool((position_ids[starts] != 0).any()):
        raise ValueError(
            "position_ids: flash attention separates packed documents only in a single row without padding or cached "
            "tokens, where each begins at position 0; set attn_implementation='sdpa'"
        )

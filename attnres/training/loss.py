"""Next-token NLL, with or without a tensor of all logits.

With a vocabulary of 152k, the logits of one micro-batch are the largest tensor of a step: 8 windows of 2,048 tokens
make 10 GB in fp32, and their gradient as much again. The other ways compute the same sum from hidden states and the
head's weight, a slice of positions at a time.
"""

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.utils.checkpoint import checkpoint

from attnres.data import NO_TARGET
from attnres.errors import ConfigError
from attnres.training.config import Loss

# `auto` keeps the logits of a micro-batch whole up to this size, and slices are cut to it: smaller ones would add up
# the head's gradient, a vocabulary times width matrix, more often than the products cost.
LOGITS_BYTES = 2**30


def choose(loss: Loss, positions: int, vocab_size: int) -> Loss:
    """Resolves `auto` for a micro-batch: `plain` while its fp32 logits fit into `LOGITS_BYTES`, else `chunked`."""
    if loss != "auto":
        return loss
    return "plain" if 4 * positions * vocab_size <= LOGITS_BYTES else "chunked"


def nll_sum(model: nn.Module, batch: dict[str, Tensor], loss: Loss = "plain") -> tuple[Tensor, Tensor]:
    """Summed next-token NLL in fp32 nats, and the number of targets, of a batch with shifted labels.

    The model gets no mask and no cache: only then do positions that start anew isolate documents from each other.

    Args:
        batch: `input_ids [B, T]`, `labels [B, T]` with -100 where there is no target, optionally `position_ids [B, T]`.
        loss: how the NLL is computed: `plain` from all logits, `auto` as `choose` says, else as `linear_nll` says. The
            value and the gradients are the same to rounding.
    """
    inputs = {"input_ids": batch["input_ids"]}
    if "position_ids" in batch:
        inputs["position_ids"] = batch["position_ids"]
    labels = batch["labels"].flatten()
    loss = choose(loss, labels.numel(), model.config.vocab_size)  # type: ignore[union-attr, arg-type]
    if loss == "plain":
        logits = model(**inputs, use_cache=False).logits
        total = F.cross_entropy(logits.float().flatten(0, 1), labels, ignore_index=NO_TARGET, reduction="sum")
    else:
        run: Any = getattr(model, "attnres_nll", None) or MethodType(_from_hidden, model)
        total = run(inputs, labels, loss)
    return total, (labels != NO_TARGET).sum()


def sum_dtype(device: torch.device) -> torch.dtype:
    """In which losses and counts are added up over batches: fp32 stops counting at 2^24; Apple's GPUs have no fp64."""
    return torch.float32 if device.type == "mps" else torch.float64


def attach(model: nn.Module) -> None:
    """Makes the loss from hidden states a forward method of a sharded model, which gathers its weights for it."""
    model.attnres_nll = MethodType(_from_hidden, model)  # type: ignore[assignment]
    register_fsdp_forward_method(model, "attnres_nll")


def _from_hidden(model: Any, inputs: dict[str, Tensor], labels: Tensor, loss: Loss) -> Tensor:
    hidden = model.model(**inputs, use_cache=False).last_hidden_state
    return linear_nll(hidden.flatten(0, 1), model.lm_head.weight, labels, loss)


def linear_nll(hidden: Tensor, weight: Tensor, labels: Tensor, loss: Loss) -> Tensor:
    """Summed cross-entropy of `hidden @ weight.T` in fp32 nats, without all logits at once.

    Products run in autocast's dtype where it is on, cross-entropy in fp32.

    Args:
        hidden: `[N, D]`.
        weight: `[V, D]`, of the head.
        labels: `[N]`; -100 is ignored.
        loss: `chunked` (slices of `LOGITS_BYTES`, logits recomputed in the backward pass) or `torch` (torch's own
            `F.linear_cross_entropy`).

    Raises:
        ConfigError: this torch does not have what `loss` names.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    return _chunked(hidden, weight, labels) if loss == "chunked" else _torch(hidden, weight, labels)


def _chunked(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    rows = max(1, LOGITS_BYTES // (4 * weight.shape[0]))
    total = hidden.new_zeros((), dtype=sum_dtype(hidden.device))
    for states, targets in zip(hidden.split(rows), labels.split(rows), strict=True):
        total = total + checkpoint(_slice_nll, states, weight, targets, use_reentrant=False, preserve_rng_state=False)
    return total.float()


def _slice_nll(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    # Cast here and not by autocast, whose one cached copy would add up the slices' gradients in low precision.
    with torch.autocast(hidden.device.type, enabled=False):
        logits = F.linear(hidden, weight.to(hidden.dtype))
    return F.cross_entropy(logits.float(), labels, ignore_index=NO_TARGET, reduction="sum")


def _torch(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    if not hasattr(F, "linear_cross_entropy"):
        raise ConfigError(f"trainer.loss: torch {torch.__version__} has no linear_cross_entropy; use chunked")
    # Without options torch computes all logits at once.
    options = nn.LinearCrossEntropyOptions()
    with torch.autocast(hidden.device.type, enabled=False):
        return F.linear_cross_entropy(
            hidden, weight.to(hidden.dtype), labels, reduction="sum", ignore_index=NO_TARGET, options=options
        ).float()

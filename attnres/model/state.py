"""The values that walk through the depth of the model: its state, and what a pass shares."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten
from transformers.cache_utils import Cache

from attnres.depth.plan import ReadPlan
from attnres.ops import PreparedBlock, ReadParameters


class Site(NamedTuple):
    """Where an edit applies: read number, the sublayer it feeds (`"attn"`, `"mlp"`, `"final"`) and its layer."""

    read: int
    sublayer: str
    layer: int

    @classmethod
    def of(cls, read: ReadPlan) -> "Site":
        return cls(read.index, read.sublayer, read.layer)


class Edit(Protocol):
    """An intervention on routing: a pure function of log weights at the reads that it names.

    At a read with `names(site)` the model computes `softmax(edit(site, log_weights))` and mixes the sources with it;
    all other reads take the fast path.
    """

    def names(self, site: Site) -> bool:
        """Whether this edit acts at a site."""
        ...

    def __call__(self, site: Site, log_weights: Tensor) -> Tensor:
        """New log weights `[B, T, S]` (fp32; need not be normalised) for given normalised ones; `-inf` removes."""
        ...


@runtime_checkable
class VectorEdit(Edit, Protocol):
    """An edit that also changes what a read mixes: a pure function of the source vectors.

    Routing weights are those of the model's own sources; only the vectors under them are exchanged, at this read alone.
    """

    def vectors(self, site: Site, sources: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """New source vectors, S tensors `[B, T, D]`, for given ones."""
        ...


class DepthState(NamedTuple):
    """Depth sources between two layers: an immutable value, so that a run can be resumed from any layer.

    A tuple, because libraries that move, cast or checkpoint the arguments of a layer look for tensors inside tuples.
    A new one is constructed: torch 2.11 cannot return from a compiled layer what `_replace` makes.

    Attributes:
        finished: finished sources `[B, T, D]`, oldest first.
        current: the running state `[B, T, D]`, or None while it is empty.
        update: output of the last sublayer, not yet added to `current`, or None.
        prepared: what the open reads share that are still to come, or None if there are none.
    """

    finished: tuple[Tensor, ...]
    current: Tensor | None = None
    update: Tensor | None = None
    prepared: PreparedBlock | None = None


class Trace(NamedTuple):
    """What one read did, for those who look.

    Attributes:
        site: which read.
        log_weights: `[B, T, S]`, after an edit if there was one.
        sources: S tensors `[B, T, D]`, oldest first.
        norm_eps: eps of the norm behind the read.
    """

    site: Site
    log_weights: Tensor
    sources: tuple[Tensor, ...]
    norm_eps: float


Observer = Callable[[Trace], None]


@dataclass(frozen=True)
class Context:
    """What all layers of one forward pass share; made by `Qwen3AttnResModel.context`.

    Attributes:
        reads: the reads, in the order of the plan: called, each gives its parameters.
        together: read -> the reads that are scored together with it, itself among them.
    """

    reads: tuple[Callable[[], ReadParameters], ...]
    together: tuple[range, ...]
    position_embeddings: tuple[Tensor, Tensor]
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    past_key_values: Cache | None = None
    edit: Edit | None = None
    observe: Observer | None = None
    attention_kwargs: dict[str, Any] | None = None

    def parameters(self, reads: Sequence[int], device: torch.device) -> list[ReadParameters]:
        """The parameters of some reads, on the device of the sources."""
        called = (self.reads[read]() for read in reads)
        return [ReadParameters(*(vector.to(device) for vector in read if vector is not None)) for read in called]

    def to(self, device: Any, non_blocking: bool = False) -> "Context":
        """The context of layers on another device: accelerate calls it where it moves the arguments of a layer."""

        def move(value: Any) -> Any:
            return value.to(device, non_blocking=non_blocking) if isinstance(value, Tensor) else value

        names = ("position_embeddings", "attention_mask", "position_ids", "attention_kwargs")
        return replace(self, **{name: tree_map(move, getattr(self, name)) for name in names})


def checkpointed(
    checkpoint: Callable[..., Any],
    layer: Callable[[DepthState, Context, str], DepthState],
    state: DepthState,
    context: Context,
    backend: str,
) -> DepthState:
    """A layer whose activations are computed again in the backward pass, which observers do not see.

    Args:
        checkpoint: called with a function and its arguments. A reentrant one passes gradients on through tensors among
            the arguments and results alone: the state goes through it leaf by leaf, and so does what reads did.
        layer: the layer's forward.
    """
    leaves, form = tree_flatten(state)
    form_behind: list[TreeSpec] = []

    def run(*leaves: Any) -> tuple[Any, ...]:
        traces: list[Trace] = []
        inner = context if context.observe is None else replace(context, observe=traces.append)
        results, found = tree_flatten((layer(tree_unflatten(leaves, form), inner, backend), traces))
        form_behind.append(found)
        return tuple(results)

    behind: DepthState
    results = checkpoint(run, *leaves)
    behind, traces = tree_unflatten(results, form_behind[0])
    for trace in traces:
        assert context.observe is not None
        context.observe(trace)
    return behind

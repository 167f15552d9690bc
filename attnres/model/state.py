"""The values that walk through the depth of the model: its state, and what a pass shares."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor
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


@dataclass(frozen=True)
class DepthState:
    """Depth sources between two layers: an immutable value, so that a run can be resumed from any layer.

    Attributes:
        finished: finished sources `[B, T, D]`, oldest first.
        current: the running state `[B, T, D]`, or None while it is empty.
        update: output of the last sublayer, not yet added to `current`, or None.
        prepared: what the reads of the open block share, or None before the first block is opened.
    """

    finished: tuple[Tensor, ...]
    current: Tensor | None = None
    update: Tensor | None = None
    prepared: PreparedBlock | None = None


@dataclass(frozen=True)
class Trace:
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
    """What all layers of one forward pass share; made by `Qwen3AttnResModel.context`."""

    reads: tuple[ReadParameters, ...]
    position_embeddings: tuple[Tensor, Tensor]
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    past_key_values: Cache | None = None
    edit: Edit | None = None
    observe: Observer | None = None
    attention_kwargs: dict[str, Any] | None = None

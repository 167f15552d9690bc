"""What interventions do to log weights and source vectors at a read: pure functions, composed into edits of a model.

`edit` turns a specification (`ids.py`) into what the model takes; `_change` says which change carries out which kind.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from attnres.depth.families import family_indices, other_indices
from attnres.depth.plan import DepthPlan
from attnres.interventions.ids import Intervention, Spec
from attnres.model.state import Site

# Most of the mass outside a family that its matched control may remove: what is left must carry the read.
MATCHED_SHARE = 0.9


class WeightChange(Protocol):
    """New log weights `[B, T, S]` (need not be normalised) for normalised ones."""

    def weights(self, log_weights: Tensor) -> Tensor: ...


@runtime_checkable
class VectorChange(Protocol):
    """New source vectors, S tensors `[B, T, D]`, under unchanged weights."""

    def exchanged(self, sources: tuple[Tensor, ...]) -> tuple[Tensor, ...]: ...


Change = WeightChange | VectorChange


@dataclass(frozen=True)
class Scale:
    """Multiplies the odds of some sources by `factor`: a bias of `log factor`, which at 0 removes them.

    Attributes:
        members: positions of the sources.
        factor: 0 or more.
    """

    members: tuple[int, ...]
    factor: float

    def weights(self, log_weights: Tensor) -> Tensor:
        members = torch.tensor(self.members, device=log_weights.device)
        if self.factor == 0:
            return log_weights.index_fill(-1, members, float("-inf"))
        bias = torch.zeros(log_weights.shape[-1], dtype=log_weights.dtype, device=log_weights.device)
        return log_weights + bias.index_fill(0, members, math.log(self.factor))


@dataclass(frozen=True)
class Replace:
    """Sets all weights of a read.

    Attributes:
        log_weights: `[S]`, or `[B, T, S]` (another document's).
    """

    log_weights: Tensor

    def weights(self, log_weights: Tensor) -> Tensor:
        return self.log_weights.to(log_weights).expand_as(log_weights)


@dataclass(frozen=True)
class RemoveMatched:
    """The control of a mask: per token, takes as much mass from random sources outside a family as the family holds.

    It removes `min(a_F, 0.9 (1 - a_F))`: sources outside are emptied in the order of `noise`, the last of them in part.

    Attributes:
        members: positions of the family.
        noise: `[B, T, S]`, independent uniform numbers.
    """

    members: tuple[int, ...]
    noise: Tensor

    def weights(self, log_weights: Tensor) -> Tensor:
        weights = torch.exp(log_weights)
        members = torch.tensor(self.members, device=weights.device)
        held = weights[..., list(self.members)].sum(-1, keepdim=True)
        wanted = torch.minimum(held, MATCHED_SHARE * (1 - held))
        # The family comes last in the order, behind everything that may be taken.
        order = self.noise.to(weights).index_fill(-1, members, 2.0).argsort(-1)
        queued = weights.gather(-1, order)
        before = queued.cumsum(-1) - queued
        taken = torch.minimum((wanted - before).clamp_min(0), queued)
        taken = torch.zeros_like(weights).scatter(-1, order, taken).index_fill(-1, members, 0.0)
        return torch.where(taken > 0, torch.log((weights - taken).clamp_min(0)), log_weights)


@dataclass(frozen=True)
class Exchange:
    """Puts other vectors in place of some sources; the weights stay those of the model's own.

    The vectors are another document's (`values`) or the clean run's (`rescue`).

    Attributes:
        members: positions of the sources.
        donors: one tensor `[B, T, D]` for each of them.
    """

    members: tuple[int, ...]
    donors: tuple[Tensor, ...]

    def exchanged(self, sources: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        changed = list(sources)
        for position, donor in zip(self.members, self.donors, strict=True):
            changed[position] = donor
        return tuple(changed)


@dataclass(frozen=True)
class RoutingEdit:
    """Changes some reads; takes the explicit path at all of them.

    Clean and edited runs of a probe go through the same arithmetic at every read, so that they differ by the
    intervention alone, and one clean run serves every cell.

    Attributes:
        at: read number -> what happens there, in order.
    """

    at: Mapping[int, tuple[Change, ...]]

    def names(self, site: Site) -> bool:
        return True

    def __call__(self, site: Site, log_weights: Tensor) -> Tensor:
        edited = False
        for change in self.at.get(site.read, ()):
            if not isinstance(change, VectorChange):
                log_weights = change.weights(torch.log_softmax(log_weights, -1) if edited else log_weights)
                edited = True
        return log_weights

    def vectors(self, site: Site, sources: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        for change in self.at.get(site.read, ()):
            if isinstance(change, VectorChange):
                sources = change.exchanged(sources)
        return sources


NO_EDIT = RoutingEdit({})


@dataclass(frozen=True)
class RowsEdit:
    """Different edits for different rows of one batch.

    Attributes:
        edits: one for each group of rows.
        rows: rows of a group; the batch has `rows * len(edits)`.
    """

    edits: Sequence[RoutingEdit]
    rows: int

    def names(self, site: Site) -> bool:
        return True

    def __call__(self, site: Site, log_weights: Tensor) -> Tensor:
        if not any(site.read in edit.at for edit in self.edits):
            return log_weights
        groups = log_weights.split(self.rows)
        return torch.cat([edit(site, group) for edit, group in zip(self.edits, groups, strict=True)])

    def vectors(self, site: Site, sources: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        exchanging = (isinstance(change, VectorChange) for edit in self.edits for change in edit.at.get(site.read, ()))
        if not any(exchanging):
            return sources
        groups = zip(*(source.split(self.rows) for source in sources), strict=True)
        changed = [edit.vectors(site, tuple(group)) for edit, group in zip(self.edits, groups, strict=True)]
        return tuple(torch.cat(rows) for rows in zip(*changed, strict=True))


@dataclass(frozen=True)
class Inputs:
    """What interventions need beside the model, for one batch of windows.

    Attributes:
        mean: read -> mean routing weights `[S]` on the pilot split.
        donor_weights: read -> log weights `[B, T, S]` of each window's donor.
        donor_sources: read -> source vectors of each window's donor, S tensors `[B, T, D]`.
        clean_sources: read -> source vectors of the windows' own clean run, S tensors `[B, T, D]`.
        noise: read -> uniform numbers `[B, T, S]`, a function of seed, window and read.
    """

    mean: Mapping[int, Tensor]
    donor_weights: Mapping[int, Tensor]
    donor_sources: Mapping[int, tuple[Tensor, ...]]
    clean_sources: Mapping[int, tuple[Tensor, ...]]
    noise: Mapping[int, Tensor]


NO_INPUTS = Inputs({}, {}, {}, {}, {})


def edit(spec: Spec, plan: DepthPlan, inputs: Inputs = NO_INPUTS) -> RoutingEdit:
    """The edit that carries an intervention out at the eligible reads of a model with this plan."""
    changes: dict[int, tuple[Change, ...]] = {}
    for member in spec.members:
        for read in member.cell(plan).reads if member.kind != "noop" else ():
            change = _change(member, plan.reads[read].num_sources, read, inputs)
            changes[read] = (*changes.get(read, ()), change)
    return RoutingEdit(changes)


def _change(item: Intervention, num_sources: int, read: int, inputs: Inputs) -> Change:
    if item.family is not None:
        members = family_indices(item.family, num_sources)
        if item.kind == "values":
            return Exchange(members, tuple(inputs.donor_sources[read][i] for i in members))
        if item.kind == "rescue":
            return Exchange(members, tuple(inputs.clean_sources[read][i] for i in members))
        if item.kind == "keep":
            return Scale(other_indices(item.family, num_sources), 0.0)
        if item.kind == "matched":
            return RemoveMatched(members, inputs.noise[read])
        if item.kind in ("mask", "scale"):
            return Scale(members, item.argument or 0.0)
    if item.kind == "resample":
        return Replace(inputs.donor_weights[read])
    if item.kind == "mean":
        # A weight that underflowed stays finite: what sets all weights of a read removes none of its sources.
        return Replace(torch.log(inputs.mean[read].clamp_min(torch.finfo(torch.float32).tiny)))
    if item.kind in ("uniform", "schedule"):
        logits = torch.zeros(num_sources, dtype=torch.float64)
        logits[-1] = item.argument or 0.0
        return Replace(torch.log_softmax(logits, -1))
    raise AssertionError(f"no edit carries out {item.kind!r}")

"""What is measured: effects at the logits; at a read mass, norm-aware share, displacement and mean routing weights.

The last four are seen while a clean run goes by.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from attnres.depth.families import Cell, family_indices, family_of, other_indices
from attnres.depth.plan import DepthPlan
from attnres.model.measures import norm_share
from attnres.model.state import Trace
from attnres.model.wraps import schedule_weights
from attnres.probe.subjects import Subject
from attnres.tables import columns


class Effects(NamedTuple):
    """Effect of an edit per window: `dnll` and `kl` in nats/token, `flips` a fraction of positions; each `[B]`."""

    dnll: Tensor
    kl: Tensor
    flips: Tensor


@dataclass(frozen=True)
class CleanReadout:
    """What the clean run says at every position: the yardstick of all cells of a batch.

    Attributes:
        labels: `[B, T]`.
        nll: `[B, T]` nats.
        probabilities: `[B, T, V]` fp32.
        cross_entropy: `[B, T]`, of the clean distribution with itself.
        top1: `[B, T]`.
    """

    labels: Tensor
    nll: Tensor
    probabilities: Tensor
    cross_entropy: Tensor
    top1: Tensor

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor) -> "CleanReadout":
        logits = logits.float()
        lse = torch.logsumexp(logits, dim=-1)
        probabilities = torch.exp(logits - lse.unsqueeze(-1))
        return cls(
            labels,
            lse - _at(logits, labels),
            probabilities,
            lse - torch.linalg.vecdot(probabilities, logits),
            logits.argmax(-1),
        )

    def compare(self, logits: Tensor) -> Effects:
        """Effects of a run with these logits `[B, T, V]`; exactly zero where they equal the clean ones bitwise.

        KL(clean || edited) is the cross-entropy less the clean run's with itself, both by the same arithmetic.
        """
        logits = logits.float()
        lse = torch.logsumexp(logits, dim=-1)
        nll = lse - _at(logits, self.labels)
        cross_entropy = lse - torch.linalg.vecdot(self.probabilities, logits)
        flips = (logits.argmax(-1) != self.top1).float()
        return Effects((nll - self.nll).mean(-1), (cross_entropy - self.cross_entropy).mean(-1), flips.mean(-1))


def _at(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


class Mass(NamedTuple):
    """Measures of one family at one read, per window; each `[B]`.

    Attributes:
        mass: `a_F`, the sum of its routing weights.
        norm_share: `c_F = <sum_F a_i v_i, h> / |h|^2`, which sums to 1 over all sources.
        displacement: `d_F = |RMSNorm(h) - RMSNorm(h_-F)|^2 / (2D)`, with `h_-F` the masked mix.
    """

    mass: Tensor
    norm_share: Tensor
    displacement: Tensor


def measure_mass(trace: Trace, families: tuple[str, ...]) -> dict[str, Mass]:
    """Mass, norm-aware share and displacement of families at a read."""
    weights = torch.exp(trace.log_weights)
    shares = [source.float() * weights[..., i : i + 1] for i, source in enumerate(trace.sources)]
    h = torch.stack(shares).sum(0)
    normed = _rms_norm(h, trace.norm_eps)
    measured = {}
    for family in families:
        members = family_indices(family, len(shares))
        others = list(other_indices(family, len(shares)))
        share = torch.stack([shares[i] for i in members]).sum(0)
        # Summed from the others rather than subtracted from h, which would cancel where the family holds nearly all.
        left = weights[..., others].sum(-1, keepdim=True)
        masked = torch.stack([shares[i] for i in others]).sum(0) / left
        distance = (normed - _rms_norm(masked, trace.norm_eps)).square().mean(-1) / 2
        mass = weights[..., list(members)].sum(-1)
        measured[family] = Mass(mass.mean(-1), norm_share(share, h).mean(-1), distance.mean(-1))
    return measured


def _rms_norm(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


class MassObserver:
    """Collects mass over the eligible reads of every slice while a clean run goes by."""

    def __init__(self, plan: DepthPlan, cells: Sequence[Cell]) -> None:
        self._cells = cells
        self._by_read: dict[int, list[Cell]] = {}
        for cell in cells:
            for read in cell.reads:
                self._by_read.setdefault(read, []).append(cell)
        self._sums: dict[Cell, Tensor] = {}
        self._plan = plan

    def __call__(self, trace: Trace) -> None:
        cells = self._by_read.get(trace.site.read, [])
        if not cells:
            return
        measured = measure_mass(trace, tuple(dict.fromkeys(cell.family for cell in cells)))
        for cell in cells:
            values = torch.stack(list(measured[cell.family]), dim=-1)
            self._sums[cell] = self._sums.get(cell, torch.zeros_like(values)) + values

    def table(self, identity: dict[str, Any]) -> pd.DataFrame:
        """One row per slice x window."""
        rows = []
        for cell in self._cells:
            mass, share, displacement = (self._sums[cell] / len(cell.reads)).double().cpu().unbind(-1)
            sizes = [self._plan.reads[j].num_sources for j in cell.reads]
            shares = [len(family_indices(cell.family, size)) / size for size in sizes]
            place = {"family": cell.family, "sublayer": cell.sublayer, "band": cell.band}
            values = {"mass": mass, "norm_share": share, "displacement": displacement}
            rows.append(
                pd.DataFrame(
                    identity
                    | place
                    | {name: value.numpy() for name, value in values.items()}
                    | {"uniform_share": sum(shares) / len(shares)}
                )
            )
        return pd.concat(rows, ignore_index=True)[columns.MASS.required]


class RoutingSums:
    """Sums of routing weights per read and source, over everything observed."""

    def __init__(self) -> None:
        self._sums: dict[int, tuple[Tensor, int]] = {}

    def __call__(self, trace: Trace) -> None:
        weights = torch.exp(trace.log_weights).flatten(0, -2).double()
        self._sums[trace.site.read] = (weights.sum(0), weights.shape[0])

    def table(self, split: str) -> pd.DataFrame:
        rows = [
            {"split": split, "read": read, "source": source, "total": total, "count": count}
            for read, (totals, count) in self._sums.items()
            for source, total in enumerate(totals.tolist())
        ]
        return pd.DataFrame(rows)


def routing_means(sums: pd.DataFrame) -> pd.DataFrame:
    """Mean weight per read and source, from the sums of batches."""
    totals = sums.groupby(["read", "source"])[["total", "count"]].sum().reset_index()
    return totals.assign(weight=totals["total"] / totals["count"])


def routing_table(subject: Subject, means: pd.DataFrame) -> pd.DataFrame:
    """One row per read and source, with its role, and the weight that a schedule prescribes."""
    rows = []
    for index, weights in means.groupby("read"):
        read = subject.plan.reads[int(index)]
        expected: Sequence[float] = [float("nan")] * read.num_sources
        if subject.schedule is not None:
            expected = schedule_weights(read.num_sources, subject.schedule, subject.recency_bias)
        for source, (weight, analytic) in enumerate(zip(weights["weight"].tolist(), expected, strict=True)):
            rows.append(
                {
                    "model": subject.name,
                    "read": read.index,
                    "layer": read.layer,
                    "sublayer": read.sublayer,
                    "source": source,
                    "num_sources": read.num_sources,
                    "weight": weight,
                    "analytic": analytic,
                    "role": family_of(source, read.num_sources),
                    "holds": str(read.sources[source]),
                }
            )
    return pd.DataFrame(rows, columns=columns.ROUTING.names)

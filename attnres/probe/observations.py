"""What is seen while a clean run goes by: mass of every slice by window, and mean routing weights of every read."""

from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from attnres.depth.families import Cell, family_indices, family_of
from attnres.depth.plan import DepthPlan
from attnres.model.state import Trace
from attnres.model.wraps import schedule_weights
from attnres.probe.measure import measure_mass
from attnres.probe.passes import Subject


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
        found = measure_mass(trace, tuple(dict.fromkeys(cell.family for cell in cells)))
        for cell in cells:
            values = torch.stack(list(found[cell.family]), dim=-1)
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
        return pd.concat(rows, ignore_index=True)


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
    return pd.DataFrame(rows)

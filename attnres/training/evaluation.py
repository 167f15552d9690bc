"""What is measured between two optimizer steps: validation loss, and where the routing puts its mass."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from attnres.depth.families import family_indices, grid
from attnres.depth.plan import DepthPlan
from attnres.errors import DataError, NumericsError
from attnres.model.measures import norm_share
from attnres.model.state import Trace
from attnres.training.config import Loss
from attnres.training.loss import nll_sum, sum_dtype

MEASURED = ("mass", "uniform_excess", "share", "entropy")


@torch.no_grad()
def validation_loss(
    trainer: pl.Trainer, model: nn.Module, batches: Iterable[Any], limit: int, loss: Loss = "plain"
) -> float:
    """Token-weighted mean NLL in nats/token over the first `limit` micro-batches of every rank.

    Raises:
        DataError: there is no validation batch.
        NumericsError: the mean is not finite.
    """
    device = trainer.strategy.root_device
    # Not "disable", which in torchmetrics 1.9 replaces all weights by one, nor the default, which drops NaN.
    metric = MeanMetric(nan_strategy="error").set_dtype(sum_dtype(device)).to(device)
    seen = 0
    with _evaluating(trainer, model):
        for batch in islice(batches, limit):
            batch = trainer.strategy.batch_to_device(batch)
            total, count = nll_sum(model, batch, loss)
            # As infinity, a NaN reaches the mean on every rank.
            mean = (total.to(sum_dtype(device)) / count.clamp(min=1)).nan_to_num(torch.inf, torch.inf)
            metric.update(mean, weight=count)
            seen += 1
    if not seen:
        raise DataError("the validation split gives no batch; raise data.validation or lower micro_batch_size")
    value = float(metric.compute())
    if not math.isfinite(value):
        raise NumericsError("the validation loss is not finite; lower optim.lr or look at the validation text")
    return value


@dataclass(frozen=True)
class ReadSummary:
    """One read, averaged over positions and windows.

    Attributes:
        mass: routing weight of each source, `[S]`.
        share: norm-aware share of each source, `<a_i v_i, h> / |h|^2` with `h` the mix; sums to 1, `[S]`.
        entropy: of the routing weights, in nats, a scalar.
    """

    mass: Tensor
    share: Tensor
    entropy: Tensor


def summarise_read(log_weights: Tensor, sources: Sequence[Tensor]) -> ReadSummary:
    """Summary of a read from its log weights `[B, T, S]` and sources (S times `[B, T, D]`)."""
    weights = log_weights.float().exp()
    contributions = [weights[..., i, None] * source.float() for i, source in enumerate(sources)]
    mix = torch.stack(contributions).sum(dim=0)
    share = torch.stack([norm_share(contribution, mix).mean() for contribution in contributions])
    return ReadSummary(weights.mean(dim=(0, 1)), share, torch.special.entr(weights).sum(dim=-1).mean())


@torch.no_grad()
def routing_slices(
    trainer: pl.Trainer, model: nn.Module, plan: DepthPlan, batch: Any
) -> list[dict[str, str | int | float]]:
    """`slice_rows` of one batch, averaged over ranks."""
    reads: list[ReadSummary] = []

    def observe(trace: Trace) -> None:
        reads.append(summarise_read(trace.log_weights, trace.sources))

    with _evaluating(trainer, model):
        batch = trainer.strategy.batch_to_device(batch)
        inputs = {key: batch[key] for key in ("input_ids", "position_ids") if key in batch}
        model(**inputs, observe=observe, use_cache=False, logits_to_keep=1)
    # Every rank has the same slices; only the measured numbers differ.
    rows = slice_rows(plan, reads)
    measured = torch.stack([row[name] for row in rows for name in MEASURED])
    values = iter(trainer.strategy.reduce(measured, reduce_op="mean").tolist())
    return [row | {name: next(values) for name in MEASURED} for row in rows]


def slice_rows(plan: DepthPlan, reads: Sequence[ReadSummary]) -> list[dict[str, Any]]:
    """A row per slice that has a read: family, sublayer, band, over the reads eligible for that family.

    Beside the `MEASURED` numbers (scalar tensors) stand how many reads it has and their mean number of sources.
    `entropy` is over all sources of a read, so that it says how sharp the reads are, whatever the family.
    """
    rows: list[dict[str, Any]] = []
    for cell in grid(plan):
        if not cell.reads:
            continue
        members = [list(family_indices(cell.family, plan.reads[j].num_sources)) for j in cell.reads]
        mass = torch.stack([reads[j].mass[m].sum() for j, m in zip(cell.reads, members, strict=True)])
        uniform = torch.tensor([len(m) / plan.reads[j].num_sources for j, m in zip(cell.reads, members, strict=True)])
        share = torch.stack([reads[j].share[m].sum() for j, m in zip(cell.reads, members, strict=True)])
        entropy = torch.stack([reads[j].entropy for j in cell.reads])
        rows.append(
            {
                "family": cell.family,
                "sublayer": cell.sublayer,
                "band": cell.band,
                "reads": len(cell.reads),
                "mean_sources": cell.mean_sources,
                "mass": mass.mean(),
                "uniform_excess": (mass - uniform.to(mass)).mean(),
                "share": share.mean(),
                "entropy": entropy.mean(),
            }
        )
    return rows


def routing_metrics(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The rows as scalars: `routing/<family>/...` is mass, `routing/share/<family>/...` and `routing/entropy/...`."""
    metrics: dict[str, float] = {}
    for row in rows:
        where = f"{row['sublayer']}/{row['band']}"
        metrics[f"routing/{row['family']}/{where}"] = row["mass"]
        metrics[f"routing/share/{row['family']}/{where}"] = row["share"]
        # The newest source is there wherever there are several.
        if row["family"] == "current":
            metrics[f"routing/entropy/{where}"] = row["entropy"]
    return metrics


@contextmanager
def _evaluating(trainer: pl.Trainer, model: nn.Module) -> Iterator[None]:
    """Evaluation mode, in the precision of training."""
    model.eval()
    try:
        with trainer.precision_plugin.forward_context():
            yield
    finally:
        model.train()

"""What is measured between two optimizer steps: validation loss, and where the routing puts its mass."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from attnres.errors import DataError, NumericsError
from attnres.model.families import BANDS, SUBLAYERS, band_layers, family_indices, grid
from attnres.model.plan import DepthPlan
from attnres.training.config import Loss
from attnres.training.loss import nll_sum


@torch.no_grad()
def validation_loss(
    trainer: pl.Trainer, model: nn.Module, batches: Iterable[Any], limit: int, loss: Loss = "plain"
) -> float:
    """Token-weighted mean NLL in nats/token over the first `limit` micro-batches of every rank.

    Raises:
        DataError: there is no validation batch.
        NumericsError: the mean is not finite.
    """
    # Not "disable", which in torchmetrics 1.9 replaces all weights by one, nor the default, which drops NaN.
    metric = MeanMetric(nan_strategy="error").to(trainer.strategy.root_device)
    seen = 0
    with _evaluating(trainer, model):
        for batch in islice(batches, limit):
            batch = trainer.strategy.batch_to_device(batch)
            total, count = nll_sum(model, batch, loss)
            # As infinity, a NaN reaches the mean on every rank.
            metric.update((total / count.clamp(min=1)).nan_to_num(torch.inf, torch.inf), weight=count)
            seen += 1
    if not seen:
        raise DataError("the validation split gives no batch; raise data.validation or lower micro_batch_size")
    mean = float(metric.compute())
    if not math.isfinite(mean):
        raise NumericsError("the validation loss is not finite; lower optim.lr or look at the validation text")
    return mean


@torch.no_grad()
def routing_metrics(trainer: pl.Trainer, model: nn.Module, plan: DepthPlan, batch: Any) -> dict[str, float]:
    """`routing_summary` of one batch, averaged over ranks."""
    with _evaluating(trainer, model):
        batch = trainer.strategy.batch_to_device(batch)
        inputs = {key: batch[key] for key in ("input_ids", "position_ids") if key in batch}
        routing = model(**inputs, output_routing=True, use_cache=False, logits_to_keep=1).routing
    summary = routing_summary(plan, routing)
    values = trainer.strategy.reduce(torch.stack(list(summary.values())), reduce_op="mean")
    return dict(zip(summary, values.tolist(), strict=True))


def routing_summary(plan: DepthPlan, routing: Sequence[Tensor]) -> dict[str, Tensor]:
    """Mean routing mass per family, sublayer and band, and mean entropy in nats per sublayer and band.

    Args:
        routing: one `[B, T, S_j]` tensor per read.

    Returns:
        Scalars under `routing/<family>/<sublayer>/<band>`, over the reads eligible for that family, and
        `routing/entropy/<sublayer>/<band>`, over the reads with several sources. Slices without a read are
        left out.
    """
    means = [weights.float().mean(dim=(0, 1)) for weights in routing]
    summary = {}
    for cell in grid(plan):
        if cell.reads:
            mass = [means[j][list(family_indices(cell.family, plan.reads[j].num_sources))].sum() for j in cell.reads]
            summary[f"routing/{cell.family}/{cell.sublayer}/{cell.band}"] = torch.stack(mass).mean()
    for sublayer in SUBLAYERS:
        for band in BANDS:
            reads = [plan.reads[2 * layer + SUBLAYERS.index(sublayer)] for layer in band_layers(band, plan.num_layers)]
            entropy = [torch.special.entr(routing[r.index].float()).sum(-1).mean() for r in reads if r.num_sources > 1]
            if entropy:
                summary[f"routing/entropy/{sublayer}/{band}"] = torch.stack(entropy).mean()
    return summary


@contextmanager
def _evaluating(trainer: pl.Trainer, model: nn.Module) -> Iterator[None]:
    """Evaluation mode, in the precision of training."""
    model.eval()
    try:
        with trainer.precision_plugin.forward_context():
            yield
    finally:
        model.train()

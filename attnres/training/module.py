"""The LightningModule: loss, gradient scaling and clipping, and the state that a resumed run needs."""

import random
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn

from attnres.errors import NumericsError
from attnres.training.config import Loss, OptimConfig
from attnres.training.loss import attach, nll_sum
from attnres.training.optim import build_optimizer, lr_multiplier
from attnres.training.strategy import shard


@dataclass(frozen=True)
class StepStats:
    """One finished optimizer step: nats/token of the global batch, gradient norm before clipping, lr."""

    loss: float
    grad_norm: float
    lr: float


class CausalLMModule(pl.LightningModule):
    """Trains any Hugging Face causal language model on token windows.

    **Normalisation.** The gradient of a step is that of (summed NLL of the global batch) / (its number of
    targets), whatever the split into micro-batches and ranks and however unevenly targets fall on them. A
    micro-batch returns its summed NLL over a constant, its number of positions; Lightning averages over
    micro-batches and ranks; at the step, one reduction gives the true count and gradients are rescaled by
    (nominal / true) in the same multiplication as clipping.

    Args:
        model: fp32 master weights.
        max_steps: length of the schedule in optimizer steps.
        seed: of the run; every micro-batch reseeds from (seed, step, micro-batch, rank), so that no random state
            needs saving.
        loss: how the NLL is computed (see `attnres.training.loss`).

    Raises:
        NumericsError: from the step whose loss or gradient is not finite, before any weight changes.
    """

    def __init__(self, model: nn.Module, optim: OptimConfig, max_steps: int, seed: int, loss: Loss = "plain") -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self.optim = optim
        self.max_steps = max_steps
        self.seed = seed
        self.tokens_seen = 0
        self.val_loss: float | None = None
        self.last_step: StepStats | None = None
        self._micro: list[tuple[Tensor, Tensor, Tensor]] = []
        self._positions = 0
        self._sharded = False

    def configure_model(self) -> None:
        """Shards the model under FSDP2; Lightning may call it more than once, hence the guard."""
        if self.device_mesh is None or self._sharded:
            return
        shard(self.model, self.device_mesh["data_parallel"], bf16=self.trainer.precision == "bf16-mixed")
        attach(self.model)
        self._sharded = True

    def configure_optimizers(self) -> Any:
        optimizer = build_optimizer(self.model, self.optim, self.device)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_multiplier(self.optim, self.max_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_batch_start(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        entropy = (self.seed, self.trainer.global_step, len(self._micro), self.global_rank)
        state = int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])
        random.seed(state)
        np.random.seed(state % 2**32)
        torch.manual_seed(state)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        total, count = nll_sum(self.model, batch, self.loss)
        self._micro.append((total.detach(), count, batch["sample_ids"]))
        self._positions = batch["labels"].numel()
        return total / self._positions

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Turns averaged gradients into per-token ones and clips them, or stops at a non-finite value."""
        micro, self._micro = self._micro, []
        sums = torch.stack([torch.stack([total, count.float()]) for total, count, _ in micro]).sum(dim=0)
        sums = self.trainer.strategy.reduce(sums, reduce_op="sum")
        nominal = self._positions * self.trainer.accumulate_grad_batches * self.trainer.world_size
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        # The only wait for the device in a step.
        total, count, norm_value = torch.stack([*sums, norm.to(sums)]).tolist()
        if not np.isfinite(total) or not np.isfinite(norm_value) or count == 0:
            raise self._numerics_error(micro, total, count)
        scale = nominal / count
        norm_value *= scale
        if self.optim.grad_clip > 0:
            scale *= min(1.0, self.optim.grad_clip / (norm_value + 1e-6))
        if scale != 1.0:
            torch._foreach_mul_(gradients, scale)
        self.tokens_seen += int(count)
        self.last_step = StepStats(total / count, norm_value, optimizer.param_groups[0]["lr"])

    def _numerics_error(self, micro: list[tuple[Tensor, Tensor, Tensor]], total: float, count: float) -> NumericsError:
        step = self.trainer.global_step + 1
        if count == 0:
            return NumericsError(f"step {step}: no target token in the global batch; check data.isolate_documents")
        bad = [m for m in micro if not torch.isfinite(m[0])]
        ids = [i for m in (bad or micro) for i in m[2].tolist()]
        what = "the gradient norm" if np.isfinite(total) else "the loss"
        where = "" if bad or np.isfinite(total) else " (the non-finite micro-batch is on another rank)"
        return NumericsError(
            f"step {step}: {what} is not finite on rank {self.global_rank}, sample ids {ids}{where};"
            " no checkpoint was written: lower optim.lr, or run with debug=true to find the operation"
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["attnres"] = {
            "step": self.trainer.global_step,
            "tokens": self.tokens_seen,
            "val_loss": self.val_loss,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint["attnres"]
        self.tokens_seen, self.val_loss = saved["tokens"], saved["val_loss"]
        align_progress(checkpoint, saved["step"], self.trainer.accumulate_grad_batches)


def align_progress(checkpoint: dict[str, Any], step: int, accumulate: int) -> None:
    """Rewrites Lightning's count of micro-batches for this run's accumulation, in place.

    The count decides where an accumulation ends. Saved with another micro-batch size or number of ranks, it
    need not be a multiple of the new accumulation, and the first step would be cut short. `completed` stays
    one behind, which is how Lightning recognises a checkpoint written at the end of a batch.
    """
    done = step * accumulate
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    for counts in (progress["total"], progress["current"]):
        counts.update(ready=done, started=done, processed=done, completed=done - 1)

"""The LightningModule: loss, gradient scaling and clipping, and the state that a resumed run needs."""

import random
from dataclasses import dataclass
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn

from attnres.errors import NumericsError
from attnres.training.config import Loss, OptimConfig
from attnres.training.learning_rate import lr_multiplier
from attnres.training.loss import attach, nll_sum, sum_dtype
from attnres.training.optimizer import build_optimizer
from attnres.training.strategy import shard


@dataclass(frozen=True)
class StepStats:
    """One finished optimizer step.

    Attributes:
        loss: nats/token of the global batch.
        grad_norm: of the whole model's gradient, before clipping.
        lr: that the step was made with.
    """

    loss: float
    grad_norm: float
    lr: float


class MicroBatch(NamedTuple):
    """What a step keeps of a micro-batch: summed NLL (nats), number of targets, and sample ids `[B]`."""

    nll: Tensor
    targets: Tensor
    sample_ids: Tensor


class CausalLMModule(pl.LightningModule):
    """Trains any Hugging Face causal language model on token windows.

    **Normalisation.** The loss of a step is the summed NLL of the global batch over its number of targets. It and its
    gradient do not depend on how the batch is split into micro-batches and ranks, nor on how unevenly targets fall on
    them. `training_step` returns a micro-batch's summed NLL over its number of positions, a constant; Lightning
    averages over micro-batches and ranks. `on_before_optimizer_step` reduces the number of targets over all ranks and
    rescales the gradient by (positions / targets), in the same multiplication that clips it.

    Args:
        model: fp32 master weights.
        max_steps: length of the learning-rate schedule in optimizer steps.
        seed: of the run; every micro-batch reseeds from (seed, step, micro-batch, rank), so that no random state
            needs saving.

    Raises:
        NumericsError: by the step whose loss or gradient is not finite, before any weight changes.
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
        self._micro: list[MicroBatch] = []
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
        self._micro.append(MicroBatch(total.detach(), count, batch["sample_ids"]))
        self._positions = batch["labels"].numel()
        return total / self._positions

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """The gradient of the step is complete: measures the step, makes its gradient per token, and clips it."""
        micro, self._micro = self._micro, []
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        nll, targets, norm = self._measure(micro, gradients)
        if not np.isfinite(nll) or not np.isfinite(norm) or targets == 0:
            raise self._numerics_error(micro, nll, targets)
        # Lightning has averaged over this many positions.
        positions = self._positions * self.trainer.accumulate_grad_batches * self.trainer.world_size
        scale = positions / targets
        norm *= scale
        if self.optim.grad_clip > 0:
            scale *= min(1.0, self.optim.grad_clip / (norm + 1e-6))
        if scale != 1.0:
            torch._foreach_mul_(gradients, scale)
        self.tokens_seen += int(targets)
        self.last_step = StepStats(loss=nll / targets, grad_norm=norm, lr=optimizer.param_groups[0]["lr"])

    def _measure(self, micro: list[MicroBatch], gradients: list[Tensor]) -> tuple[float, float, float]:
        """Summed NLL and number of targets of the global batch, and the norm of the averaged gradient."""
        exact = sum_dtype(self.device)
        sums = torch.stack([torch.stack([m.nll.to(exact), m.targets.to(exact)]) for m in micro]).sum(dim=0)
        sums = self.trainer.strategy.reduce(sums, reduce_op="sum")
        norm = torch.nn.utils.get_total_norm(gradients)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        # The only wait for the device in a step.
        nll, targets, norm_value = torch.stack([*sums, norm.to(sums)]).tolist()
        return nll, targets, norm_value

    def _numerics_error(self, micro: list[MicroBatch], nll: float, targets: float) -> NumericsError:
        step = self.trainer.global_step + 1
        if targets == 0:
            return NumericsError(f"step {step}: no target token in the global batch; check data.isolate_documents")
        bad = [m for m in micro if not torch.isfinite(m.nll)]
        ids = [i for m in (bad or micro) for i in m.sample_ids.tolist()]
        what = "the gradient norm" if np.isfinite(nll) else "the loss"
        where = "" if bad or np.isfinite(nll) else " (the non-finite micro-batch is on another rank)"
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

    The count decides where an accumulation ends. A count that was saved with another micro-batch size or number of
    ranks need not be a multiple of the new accumulation, and the first step would be cut short. `completed` stays one
    behind: Lightning recognises by it a checkpoint that was written at the end of a batch.
    """
    done = step * accumulate
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    for counts in (progress["total"], progress["current"]):
        counts.update(ready=done, started=done, processed=done, completed=done - 1)

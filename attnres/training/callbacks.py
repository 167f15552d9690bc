"""What happens around an optimizer step: clock, progress line, and one ordered list of duties."""

import logging
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from tqdm import tqdm

from attnres import faults
from attnres.depth.plan import DepthPlan
from attnres.files.run_folder import CHECKPOINTS, list_steps, step_name
from attnres.processes.ranks import Peers
from attnres.processes.signals import StopSignals
from attnres.training.checkpoint import RunCheckpointIO, prune
from attnres.training.checkpoint_schedule import CheckpointSchedule, due
from attnres.training.config import TrainerConfig
from attnres.training.evaluation import routing_metrics, routing_slices, validation_loss
from attnres.training.flops import peak_flops
from attnres.training.module import CausalLMModule
from attnres.training.telemetry import Clock, SpikeDetector, peak_memory_gib

log = logging.getLogger(__name__)


class ProgressLine:
    """One tqdm line on stderr: step, loss, lr, tokens/s, time left."""

    def __init__(self, name: str, step: int, max_steps: int, shown: bool) -> None:
        # Into a file, a line every ten seconds is enough.
        interval = 0.2 if sys.stderr.isatty() else 10.0
        self._text = [""]
        self._bar = tqdm(
            total=max_steps,
            initial=step,
            desc=name,
            disable=not shown,
            mininterval=interval,
            maxinterval=interval,
            file=sys.stderr,
            dynamic_ncols=True,
            bar_format="{desc}: step {n_fmt}/{total_fmt} |{bar}| {postfix[0]}",
            postfix=self._text,
        )

    def update(self, loss: float, lr: float, rate: float, eta: float) -> None:
        left = "--" if eta != eta else tqdm.format_interval(int(eta))
        self._text[0] = f"loss {loss:.4f}  lr {lr:.2e}  {rate:,.0f} tok/s  ETA {left}"
        self._bar.update(1)

    def close(self) -> None:
        self._bar.close()


class StepDuties(Callback):
    """What is done between two optimizer steps, in this order: validate, look at routing, log, save, stop.

    One callback and not five, because the order is the point: a checkpoint holds the validation loss of its
    step, a row of metrics is whole, and nothing runs inside an accumulation.

    Args:
        plan: depth plan of a model that routes; None for one that does not.
        flops_per_token: of training, for MFU.
    """

    def __init__(
        self,
        config: TrainerConfig,
        name: str,
        folder: Path,
        signals: StopSignals,
        peers: Peers,
        plan: DepthPlan | None,
        flops_per_token: float,
    ) -> None:
        self.config = config
        self.schedule = CheckpointSchedule.of(config)
        self.name = name
        self.folder = folder
        self.signals = signals
        self.peers = peers
        self.plan = plan
        self.flops_per_token = flops_per_token
        self._spikes = SpikeDetector()
        self.started = False
        self.stopped_at: int | None = None
        self._bar: ProgressLine | None = None
        self._step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, CausalLMModule)
        pl_module.model.train()
        self._step = trainer.global_step
        self._tokens = pl_module.tokens_seen
        self._validation = trainer.datamodule.val_dataloader()  # type: ignore[attr-defined]
        self._bar = ProgressLine(self.name, self._step, self.config.max_steps, trainer.is_global_zero)
        self._clock = Clock()
        self.peers.meet()
        self.started = self.signals.can_save = True

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        faults.point("train.batch")
        self._clock.batch_start()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._clock.batch_end()
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            self._step_end(trainer, pl_module)
            self._clock.duties_end()

    def _step_end(self, trainer: pl.Trainer, module: CausalLMModule) -> None:
        faults.point("train.step")
        step, config = self._step, self.config
        checkpoint_io = trainer.strategy.checkpoint_io
        assert isinstance(checkpoint_io, RunCheckpointIO)
        checkpoint_io.check()
        stats, bar = module.last_step, self._bar
        assert stats is not None and bar is not None
        self._clock.step_end(module.tokens_seen - self._tokens)
        self._tokens = module.tokens_seen
        last = step >= config.max_steps
        # All ranks must take the same branch, whichever of them the signal reached.
        stop = trainer.strategy.reduce_boolean_decision(self.signals.received is not None, all=False)
        bar.update(stats.loss, stats.lr, self._clock.tokens_per_second, self._clock.eta(config.max_steps - step))

        self._look_for_spike(trainer, step, stats.loss)

        metrics: dict[str, Any] = {}
        if last or due(step, config.val_every_steps):
            limit = config.val_batches * trainer.accumulate_grad_batches
            faults.point("train.validation")
            module.val_loss = validation_loss(trainer, module.model, self._validation, limit, module.loss)
            metrics["val_loss"] = module.val_loss
        if self.plan is not None and config.routing_every_steps and (last or due(step, config.routing_every_steps)):
            rows = routing_slices(trainer, module.model, self.plan, next(iter(self._validation)))
            metrics |= routing_metrics(rows)
            for logger in trainer.loggers:
                logger.log_table("routing", [{"tokens": module.tokens_seen} | row for row in rows], step)  # type: ignore[attr-defined]
        if metrics or last or due(step, config.log_every_steps):
            row = {
                "tokens": module.tokens_seen,
                "loss": stats.loss,
                "lr": stats.lr,
                "grad_norm": stats.grad_norm,
            }
            row |= self._pace(trainer, module.device, config.max_steps - step) | metrics
            for logger in trainer.loggers:
                logger.log_metrics(row, step=step)
        if last or stop or self.schedule.due(step):
            self._save(trainer, step, ends=last or stop)
        if stop and not last:
            self.stopped_at = step
            trainer.should_stop = True

    def _look_for_spike(self, trainer: pl.Trainer, step: int, loss: float) -> None:
        rise = self._spikes.rise(loss)
        if rise is None or not trainer.is_global_zero:
            return
        told = f"step {step}: the loss is {loss:.4f}, {rise:.4f} nats/token above its recent median"
        log.warning("LOSS SPIKE at %s; training goes on", told)
        for logger in trainer.loggers:
            logger.alert("Loss spike", f"{self.name}, {told}")  # type: ignore[attr-defined]

    def _pace(self, trainer: pl.Trainer, device: torch.device, steps_left: int) -> dict[str, float]:
        """Rates since the last row, time left, and memory of the fullest rank."""
        eta = self._clock.eta(steps_left)
        rates = self._clock.read()
        mine = rates["tokens_per_second"] / trainer.world_size
        pace = rates | {"tokens_per_second_per_device": mine}
        peak = peak_flops(device, self.config.precision, self.config.peak_tflops)
        if peak is not None:
            pace["mfu"] = mine * self.flops_per_token / peak
        if eta == eta:
            pace["eta_seconds"] = eta
        memory = torch.tensor(peak_memory_gib(device), device=device)
        pace["peak_memory_gib"] = float(trainer.strategy.reduce(memory, reduce_op="max"))
        return pace

    def _save(self, trainer: pl.Trainer, step: int, ends: bool) -> None:
        path = self.folder / CHECKPOINTS / step_name(step)
        trainer.save_checkpoint(path, weights_only=False, storage_options={"wait": ends})
        if ends:
            self.peers.part()

    def published(self, checkpoint: Path) -> None:
        """Removes what the new checkpoint makes superfluous."""
        step = next(step for step, path in list_steps(self.folder).items() if path.name == checkpoint.name)
        prune(self.folder, step, self.config.keep_last, self.schedule.permanent)

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        self._close()

    def teardown(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

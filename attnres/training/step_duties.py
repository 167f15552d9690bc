"""What is done between two optimizer steps: validate, look at routing, log, save, and stop where a signal asked for it.

On a signal (`attnres.processes.signals`) the step that is under way ends, a checkpoint of it is written, and
`attnres.training.fit` ends the run with exit code 75, unless a handler of another library decides otherwise.
"""

import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from transformers import PreTrainedModel

from attnres import faults
from attnres.files.run_folder import CHECKPOINTS, list_steps, step_name
from attnres.processes.peers import Peers
from attnres.processes.signals import StopSignals
from attnres.training.checkpoint import RunCheckpointIO, prune
from attnres.training.checkpoint_schedule import CheckpointSchedule, due
from attnres.training.config import TrainConfig
from attnres.training.evaluation import routing_metrics, routing_slices, validation_loss
from attnres.training.flops import flops_per_token, peak_flops
from attnres.training.models import depth_plan
from attnres.training.module import CausalLMModule, StepStats
from attnres.training.telemetry import Clock, ProgressLine, SpikeDetector, peak_memory_gib

log = logging.getLogger(__name__)


class StepDuties(Callback):
    """The duties of a run between two optimizer steps, in their order.

    One callback and not five, because the order is the point: a checkpoint holds the validation loss of its
    step, a row of metrics is whole, and nothing runs inside an accumulation.

    Args:
        model: before it is sharded or moved.
        signals: whether the run is asked to stop; may save from the first step on.

    Attributes:
        started: whether training has begun, so that a checkpoint has been restored.
        stopped_at: the step after which a signal stopped the run, else None.
    """

    def __init__(
        self, config: TrainConfig, folder: Path, model: PreTrainedModel, signals: StopSignals, peers: Peers
    ) -> None:
        self.started = False
        self.stopped_at: int | None = None
        self._name = config.name
        self._config = config.trainer
        self._schedule = CheckpointSchedule.of(config.trainer)
        self._folder = folder
        self._signals = signals
        self._peers = peers
        self._plan = depth_plan(model.config)
        self._flops_per_token = flops_per_token(model, model.config, config.data.sequence_length)
        self._spikes = SpikeDetector()
        self._bar: ProgressLine | None = None
        self._step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, CausalLMModule)
        pl_module.model.train()
        self._step = trainer.global_step
        self._tokens = pl_module.tokens_seen
        self._validation = trainer.datamodule.val_dataloader()  # type: ignore[attr-defined]
        self._bar = ProgressLine(self._name, self._step, self._config.max_steps, trainer.is_global_zero)
        self._clock = Clock()
        self._peers.meet()
        self.started = self._signals.can_save = True

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
        step, config = self._step, self._config
        checkpoint_io = trainer.strategy.checkpoint_io
        assert isinstance(checkpoint_io, RunCheckpointIO)
        checkpoint_io.check()
        stats, bar = module.last_step, self._bar
        assert stats is not None and bar is not None
        self._clock.step_end(module.tokens_seen - self._tokens)
        self._tokens = module.tokens_seen
        last = step >= config.max_steps
        # All ranks must take the same branch, whichever of them the signal reached.
        asked = trainer.strategy.reduce_boolean_decision(self._signals.asked(), all=False)
        stop = asked and trainer.strategy.reduce_boolean_decision(self._signals.ends(), all=False)
        bar.update(stats.loss, stats.lr, self._clock.tokens_per_second, self._clock.eta(config.max_steps - step))

        self._look_for_spike(trainer, step, stats.loss)
        measured: dict[str, float] = {}
        if last or due(step, config.val_every_steps):
            measured |= self._validate(trainer, module)
        if config.routing_every_steps and (last or due(step, config.routing_every_steps)):
            measured |= self._measure_routing(trainer, module, step)
        if measured or last or due(step, config.log_every_steps):
            self._log(trainer, module, stats, measured)
        if last or asked or self._schedule.due(step):
            self._save(trainer, step, wait=last or asked)
        if last or stop:
            self._peers.leave()
        if stop and not last:
            self.stopped_at = step
            trainer.should_stop = True
        elif asked and not last:
            self._signals.hand_on()

    def _look_for_spike(self, trainer: pl.Trainer, step: int, loss: float) -> None:
        rise = self._spikes.rise(loss)
        if rise is None or not trainer.is_global_zero:
            return
        message = f"step {step}: the loss is {loss:.4f}, {rise:.4f} nats/token above its recent median"
        log.warning("LOSS SPIKE at %s; training goes on", message)
        for logger in trainer.loggers:
            logger.alert("Loss spike", f"{self._name}, {message}")  # type: ignore[attr-defined]

    def _validate(self, trainer: pl.Trainer, module: CausalLMModule) -> dict[str, float]:
        faults.point("train.validation")
        limit = self._config.val_batches * trainer.accumulate_grad_batches
        module.val_loss = validation_loss(trainer, module.model, self._validation, limit, module.loss)
        return {"val_loss": module.val_loss}

    def _measure_routing(self, trainer: pl.Trainer, module: CausalLMModule, step: int) -> dict[str, float]:
        """Logs the table of routing and returns its columns for the metrics; {} for a model that does not route."""
        if self._plan is None:
            return {}
        rows = routing_slices(trainer, module.model, self._plan, next(iter(self._validation)))
        for logger in trainer.loggers:
            logger.log_table("routing", [{"tokens": module.tokens_seen} | row for row in rows], step)  # type: ignore[attr-defined]
        return routing_metrics(rows)

    def _log(self, trainer: pl.Trainer, module: CausalLMModule, stats: StepStats, measured: dict[str, float]) -> None:
        row: dict[str, Any] = {
            "tokens": module.tokens_seen,
            "loss": stats.loss,
            "lr": stats.lr,
            "grad_norm": stats.grad_norm,
        }
        row |= self._pace(trainer, module.device) | measured
        for logger in trainer.loggers:
            logger.log_metrics(row, step=self._step)

    def _pace(self, trainer: pl.Trainer, device: torch.device) -> dict[str, float]:
        """Rates since the last row, time left, and memory of the fullest rank."""
        eta = self._clock.eta(self._config.max_steps - self._step)
        rates = self._clock.read()
        mine = rates["tokens_per_second"] / trainer.world_size
        pace = rates | {"tokens_per_second_per_device": mine}
        peak = peak_flops(device, self._config.precision, self._config.peak_tflops)
        if peak is not None:
            pace["mfu"] = mine * self._flops_per_token / peak
        if eta == eta:
            pace["eta_seconds"] = eta
        memory = torch.tensor(peak_memory_gib(device), device=device)
        pace["peak_memory_gib"] = float(trainer.strategy.reduce(memory, reduce_op="max"))
        return pace

    def _save(self, trainer: pl.Trainer, step: int, wait: bool) -> None:
        path = self._folder / CHECKPOINTS / step_name(step)
        trainer.save_checkpoint(path, weights_only=False, storage_options={"wait": wait})

    def published(self, checkpoint: Path) -> None:
        """Removes what a new checkpoint makes superfluous."""
        step = next(step for step, path in list_steps(self._folder).items() if path.name == checkpoint.name)
        prune(self._folder, step, self._config.keep_last, self._schedule.permanent)

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        self._close()

    def teardown(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

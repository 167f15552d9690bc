"""Lightning for one run: the trainer with everything off that this project does itself."""

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.environments import SLURMEnvironment

from attnres.data import accumulation_steps
from attnres.errors import ConfigError, one_line
from attnres.processes.memory import is_of_the_machine
from attnres.training.checkpoint import RunCheckpointIO
from attnres.training.config import TrainConfig
from attnres.training.step_duties import StepDuties
from attnres.training.strategy import strategy


def build_trainer(
    config: TrainConfig, folder: Path, duties: StepDuties, loggers: Sequence[Logger], checkpoint_io: RunCheckpointIO
) -> pl.Trainer:
    """The trainer of one run on the devices that its configuration names.

    Raises:
        ConfigError: the machine does not have what the configuration asks for, or the batch does not divide over it.
    """
    wanted = config.trainer
    plugins: list[Any] = [checkpoint_io]
    if SLURMEnvironment.detect():
        # Lightning's requeue saves in its own place and calls scontrol; here the job exits 75 and SLURM requeues.
        plugins.append(SLURMEnvironment(auto_requeue=False))
    _quieten_libraries()
    try:
        trainer = pl.Trainer(
            accelerator=wanted.accelerator,
            devices=wanted.devices,
            num_nodes=wanted.num_nodes,
            strategy=strategy(wanted),
            precision=wanted.precision,
            max_steps=wanted.max_steps,
            max_epochs=-1,
            logger=loggers,
            callbacks=[duties],
            plugins=plugins,
            default_root_dir=str(folder),
            # Lightning cannot tell that micro-batches and ranks are already cut by the DataModule.
            use_distributed_sampler=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            limit_val_batches=0,
            log_every_n_steps=1,
            detect_anomaly=config.debug,
        )
    except (ValueError, RuntimeError, pl.utilities.exceptions.MisconfigurationException) as error:
        if is_of_the_machine(error):
            raise
        raise ConfigError(f"trainer: {one_line(error, most=None)}") from error
    # Its handlers broadcast to other ranks from inside a signal, and end a stopped run with exit code 0;
    # `StopSignals` has the signals.
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    # Only now is the number of ranks known.
    trainer.accumulate_grad_batches = accumulation_steps(
        wanted.global_batch_size, wanted.micro_batch_size, trainer.world_size
    )
    return trainer


def _quieten_libraries() -> None:
    """Leaves out what would be wrong or useless to the reader of this program's own log."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*your dataloader is not resumable.*",
        ".*have no `validation_step`.*",
        ".*isinstance.treespec, LeafSpec.*",
    ):
        warnings.filterwarnings("ignore", message=message)

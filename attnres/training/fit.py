"""`train`: from a configuration to a finished run folder, resumable at every step."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from attnres import faults
from attnres.data import TextDataModule, prepare
from attnres.errors import AttnResError, CheckpointError, Stopped, one_line
from attnres.files.run_folder import LOCK, TRAINING_FILE, refuse_links, refuse_unsafe_loading
from attnres.files.whole_files import locked, storage_errors
from attnres.model.locate import Located
from attnres.processes.launcher import bound_to_launcher
from attnres.processes.memory import is_of_the_machine, is_out_of_memory, out_of_memory
from attnres.processes.peers import Peers, is_connection_loss
from attnres.processes.signals import StopSignals
from attnres.training.checkpoint import RunCheckpointIO
from attnres.training.config import TrainConfig, run_folder
from attnres.training.initial_weights import initial_model, resolve_base
from attnres.training.loggers import METRICS, CsvLogger, WandbLogger
from attnres.training.models import model_config, set_execution
from attnres.training.module import CausalLMModule
from attnres.training.resume import check_compatible, choose_start, completed
from attnres.training.run_records import End, Run, record_end, record_start
from attnres.training.step_duties import StepDuties
from attnres.training.trainer import build_trainer

log = logging.getLogger(__name__)

_PROMISE = "saving at the next optimizer step"
_NOTHING_SAVED = "before the first step; the same command starts again"
_SMALLER = "lower trainer.micro_batch_size (the result stays the same), or set trainer.gradient_checkpointing=true"
_FREE = "free space or fix the folder"


def train(config: TrainConfig, command: str) -> Path:
    """Trains to `max_steps`, from wherever the run folder says that it was.

    Args:
        command: the command line, for provenance.

    Returns:
        The run folder, with `complete.json` in it.

    Raises:
        ConfigError: keys that do not fit each other or the machine; the folder is in use.
        DataError: text or shards are missing or too short; raised before the model is built.
        CheckpointError: nothing intact to resume from, or a checkpoint of another configuration; a base that does not
            fit.
        NumericsError: the loss, a gradient or a weight is not finite.
        StorageError: the folder cannot be written.
        RankLost: another process of the run is gone.
        Stopped: a signal came; the state is saved and the same command resumes.
    """
    refuse_unsafe_loading()
    if config.trainer.threads is not None:
        torch.set_num_threads(config.trainer.threads)
    # Before anything is made; the corpus's own vocabulary is checked when it is known.
    model_config(config.model, vocab_size=1, eos_id=0, sequence_length=config.data.sequence_length)
    config, base = resolve_base(config)
    folder = run_folder(config)
    with bound_to_launcher() as launcher, _only_training_in(folder):
        finished = completed(folder, config.trainer.max_steps)
        if finished and config.resume != "never":
            log.info("%s: already complete at step %d; nothing to train", folder, finished["step"])
            return folder
        start = choose_start(config, folder)
        corpus = prepare(config.data)
        faults.point("train.data")
        if start.checkpoint is not None:
            check_compatible(config, corpus, start.checkpoint)
        run = Run(config, folder, corpus, start, command)
        with StopSignals(_PROMISE, _NOTHING_SAVED, launcher=launcher) as signals, out_of_memory(_SMALLER):
            end = _fit(run, base, signals)
        if end.stopped:
            by = signals.name or "a signal on another rank"
            raise Stopped(f"stopped by {by}, saved at step {end.step} in {folder}; the same command resumes")
        faults.point("train.complete")
        if _rank() == 0:
            with storage_errors(folder, _FREE):
                record_end(folder, end)
    return folder


def _fit(run: Run, base: Located | None, signals: StopSignals) -> End:
    """Batches, model, loss and gradient, then the steps; each checkpoint has a manifest and an exported folder."""
    config, folder, start = run.config, run.folder, run.start
    wanted = config.trainer
    data = TextDataModule(
        run.corpus, config.data, wanted.micro_batch_size, wanted.global_batch_size, wanted.num_workers
    )
    faults.point("train.model")
    model = initial_model(config, run.corpus, base if start.checkpoint is None else None)
    set_execution(model, config.trainer)
    module = CausalLMModule(model, config.optim, config.trainer.max_steps, config.seed, config.trainer.loss)
    if _rank() == 0:
        with storage_errors(folder, _FREE):
            record_start(run)
    peers = Peers()
    duties = StepDuties(config, folder, model, signals, peers)
    loggers = [CsvLogger(folder / METRICS, start.step), WandbLogger(config.logger, folder, run.plain, start.step)]
    checkpoint_io = RunCheckpointIO(model, run.export_info, duties.published, config.trainer.async_checkpoint)
    trainer = build_trainer(config, folder, duties, loggers, checkpoint_io)
    log.info(
        "%s: %s parameters, %d x %d tokens a step, steps %d to %d",
        folder,
        f"{sum(p.numel() for p in model.parameters()):,}",
        config.trainer.global_batch_size,
        config.data.sequence_length,
        start.step + 1,
        config.trainer.max_steps,
    )
    resume_from = str(start.checkpoint / TRAINING_FILE) if start.checkpoint else None
    faults.point("train.fit")
    with _fit_errors(trainer, peers, duties, resume_from), storage_errors(folder, _FREE), _written(checkpoint_io):
        trainer.fit(module, datamodule=data, ckpt_path=resume_from, weights_only=True)
    step = trainer.global_step if duties.stopped_at is None else duties.stopped_at
    return End(step, module.tokens_seen, module.val_loss, stopped=duties.stopped_at is not None)


@contextmanager
def _only_training_in(folder: Path) -> Iterator[None]:
    """Makes the run folder and holds its lock."""
    with storage_errors(folder, _FREE):
        folder.mkdir(parents=True, exist_ok=True)
    busy = f"{folder} is in use by another training process; wait for it or change the run"
    with locked(folder / LOCK, busy) if _rank() == 0 else nullcontext():
        refuse_links(folder)
        faults.point("train.setup")
        yield


@contextmanager
def _fit_errors(trainer: pl.Trainer, peers: Peers, duties: StepDuties, resume_from: str | None) -> Iterator[None]:
    """Says of an error of a library whether another rank is gone or a checkpoint cannot be restored."""
    try:
        yield
    except (AttnResError, OSError):
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        message = one_line(error, most=200)
        if trainer.world_size > 1 and is_connection_loss(error):
            raise peers.lost(f"rank {_rank()} was left alone ({message})") from error
        if resume_from and not duties.started and not is_of_the_machine(error):
            raise CheckpointError(
                f"{resume_from}: cannot be restored ({message}); choose another checkpoint"
            ) from error
        raise


@contextmanager
def _written(checkpoint_io: RunCheckpointIO) -> Iterator[None]:
    """Holds the error of a run back until no checkpoint is being written any more: then the folder may be let go."""
    try:
        yield
    except BaseException:
        try:
            checkpoint_io.wait()
        except (AttnResError, OSError) as error:
            log.error("%s", error)
        raise


def _rank() -> int:
    """This process's rank, as the launcher's environment or Lightning says."""
    return rank_zero_only.rank  # type: ignore[attr-defined]

"""`train`: from a configuration to a finished run folder, resumable at every step."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch.utils.data import DataLoader

from attnres import faults
from attnres.config import to_plain
from attnres.data import Corpus, TextDataModule, accumulation_steps, prepare
from attnres.errors import AttnResError, CheckpointError, ConfigError, Stopped
from attnres.files.provenance import collect
from attnres.files.redaction import redact_values
from attnres.files.run_folder import (
    CHECKPOINTS,
    COMPLETE,
    LOCK,
    TRAINING_FILE,
    refuse_links,
    refuse_unsafe_loading,
    step_name,
)
from attnres.files.whole_files import locked, read_object, storage_errors, write_json, write_text
from attnres.model.locate import Located
from attnres.processes.launcher import bound_to_launcher
from attnres.processes.memory import out_of_memory
from attnres.processes.ranks import Peers, is_connection_loss
from attnres.processes.signals import StopSignals, ignore_stop_signals
from attnres.training.callbacks import StepDuties
from attnres.training.checkpoint import ExportInfo, RunCheckpointIO, clean
from attnres.training.config import TrainConfig, config_hash, run_folder
from attnres.training.flops import flops_per_token
from attnres.training.initial_weights import freeze, resolve_base, start_from
from attnres.training.loggers import CsvLogger, WandbLogger
from attnres.training.models import build_model, model_config
from attnres.training.module import CausalLMModule
from attnres.training.resume import Start, check_compatible, choose_start, completed
from attnres.training.strategy import strategy

log = logging.getLogger(__name__)

_PROMISE = "saving at the next optimizer step, then stopping"
_NOTHING_SAVED = "before the first step; the same command starts again"
_SMALLER = "lower trainer.micro_batch_size (the result stays the same), or set trainer.gradient_checkpointing=true"
_FREE = "free space or fix the folder"


def train(config: TrainConfig, command: str) -> Path:
    """Trains to `max_steps`, from wherever the run folder says that it was.

    Args:
        config: the run.
        command: the command line, for provenance.

    Returns:
        The run folder, with `complete.json` in it.

    Raises:
        ConfigError: settings that do not fit each other or the machine; the folder is in use.
        DataError: text or shards are missing or too short; raised before the model is built.
        CheckpointError: nothing intact to resume from, or it belongs to another configuration; a base that does not
            fit.
        NumericsError: the loss, a gradient or a weight is not finite.
        : the folder cannot be written.
        Stopped: a signal came; the state is saved and the same command resumes.
    """
    refuse_unsafe_loading()
    if config.trainer.threads is not None:
        torch.set_num_threads(config.trainer.threads)
    # Before anything is made; the corpus's own vocabulary is checked when it is known.
    model_config(config.model, vocab_size=1, eos_id=0, sequence_length=config.data.sequence_length)
    config, base = resolve_base(config)
    folder = run_folder(config)
    with storage_errors(folder, _FREE):
        folder.mkdir(parents=True, exist_ok=True)
    busy = f"{folder} is in use by another training process; wait for it or change the run"
    with bound_to_launcher(), locked(folder / LOCK, busy) if _rank() == 0 else nullcontext():
        refuse_links(folder)
        faults.point("train.setup")
        finished = completed(folder, config.trainer.max_steps)
        if finished and config.resume != "never":
            log.info("%s: already complete at step %d; nothing to train", folder, finished["step"])
            return folder
        start = choose_start(config, folder)
        corpus = prepare(config.data)
        faults.point("train.data")
        if start.checkpoint is not None:
            check_compatible(config, corpus, start.checkpoint)
        _fit(config, corpus, base, folder, start, command)
    return folder


def _fit(config: TrainConfig, corpus: Corpus, base: Located | None, folder: Path, start: Start, command: str) -> None:
    settings, trainer_config = redact_values(to_plain(config)), config.trainer
    architecture = model_config(config.model, corpus.vocab_size, corpus.eos_id, config.data.sequence_length)
    with StopSignals(_PROMISE, _NOTHING_SAVED) as signals, out_of_memory(_SMALLER):
        faults.point("train.model")
        model = build_model(architecture, config.seed)
        if base is not None and start.checkpoint is None:
            start_from(model, base, config.init.wrap)
        freeze(model, config.trainable)
        if trainer_config.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if trainer_config.compile:
            # By sublayer, which all have one signature; compiling in place leaves parameter names alone.
            for layer in model.model.layers:
                layer.self_attn.compile()
                layer.mlp.compile()
        info = ExportInfo(
            tokenizer_path=Path(corpus.tokenizer_path),
            eos_id=corpus.eos_id,
            training={"name": config.name, "seed": config.seed, "command": command, "config": settings},
            data={
                "fingerprint": corpus.fingerprint,
                "tokenizer_sha256": corpus.tokenizer_sha256,
                "config": settings["data"],
            },
        )
        if _rank() == 0:
            with storage_errors(folder, _FREE):
                clean(folder)
                (folder / COMPLETE).unlink(missing_ok=True)
                _describe(folder, config, corpus, start, command)
        plan = architecture.plan() if hasattr(architecture, "plan") else None
        peers = Peers()
        flops = flops_per_token(model, architecture, config.data.sequence_length)
        duties = StepDuties(trainer_config, config.name, folder, signals, peers, plan, flops)
        loggers = [
            CsvLogger(folder / "metrics.csv", start.step),
            WandbLogger(config.logger, folder, folder.name, settings),
        ]
        checkpoint_io = RunCheckpointIO(model, info, duties.published, trainer_config.async_checkpoint)
        trainer = build_trainer(config, folder, duties, loggers, checkpoint_io)
        # Only now is the number of ranks known.
        trainer.accumulate_grad_batches = accumulation_steps(
            trainer_config.global_batch_size, trainer_config.micro_batch_size, trainer.world_size
        )
        data = _StoppableData(
            corpus,
            config.data,
            trainer_config.micro_batch_size,
            trainer_config.global_batch_size,
            trainer_config.num_workers,
        )
        module = CausalLMModule(model, config.optim, trainer_config.max_steps, config.seed, trainer_config.loss)
        log.info(
            "%s: %s parameters, %d x %d tokens a step, steps %d to %d",
            folder,
            f"{sum(p.numel() for p in model.parameters()):,}",
            trainer_config.global_batch_size,
            config.data.sequence_length,
            start.step + 1,
            trainer_config.max_steps,
        )
        resume_from = str(start.checkpoint / TRAINING_FILE) if start.checkpoint else None
        faults.point("train.fit")
        try:
            with storage_errors(folder, _FREE), _written(checkpoint_io):
                trainer.fit(module, datamodule=data, ckpt_path=resume_from, weights_only=True)
        except (AttnResError, OSError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            told = " ".join(str(error).split())[:200]
            if trainer.world_size > 1 and is_connection_loss(error):
                raise peers.lost(f"rank {_rank()} was left alone ({told})") from error
            if resume_from and not duties.started:
                raise CheckpointError(
                    f"{resume_from}: cannot be restored ({told}); choose another checkpoint"
                ) from error
            raise
    if duties.stopped_at is not None:
        name = signals.received.name if signals.received else "a signal on another rank"
        raise Stopped(f"stopped by {name}, saved at step {duties.stopped_at} in {folder}; the same command resumes")
    faults.point("train.complete")
    if _rank() == 0:
        with storage_errors(folder, _FREE):
            _finish(folder, trainer, module)


def build_trainer(
    config: TrainConfig, folder: Path, duties: StepDuties, loggers: list[Any], checkpoint_io: RunCheckpointIO
) -> pl.Trainer:
    """Lightning with everything off that this project does itself, or does not want.

    Raises:
        ConfigError: the machine does not have what the configuration asks for.
    """
    settings = config.trainer
    plugins: list[Any] = [checkpoint_io]
    if SLURMEnvironment.detect():
        # Lightning's requeue saves in its own place and calls scontrol; here the job exits 75 and SLURM
        # requeues.
        plugins.append(SLURMEnvironment(auto_requeue=False))
    _quieten_libraries()
    try:
        trainer = pl.Trainer(
            accelerator=settings.accelerator,
            devices=settings.devices,
            num_nodes=settings.num_nodes,
            strategy=strategy(settings),
            precision=settings.precision,
            max_steps=settings.max_steps,
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
        raise ConfigError(f"trainer: {' '.join(str(error).split())}") from error
    # Its handlers broadcast to other ranks from inside a signal, and end a stopped run with exit code 0;
    # `StopSignals` has the signals.
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    return trainer


@contextmanager
def _written(checkpoint_io: RunCheckpointIO) -> Iterator[None]:
    """A run that fails lets go of its folder when no checkpoint is being written there any more."""
    try:
        yield
    except BaseException:
        try:
            checkpoint_io.wait()
        except (AttnResError, OSError) as error:
            log.error("%s", error)
        raise


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


def _describe(folder: Path, config: TrainConfig, corpus: Corpus, start: Start, command: str) -> None:
    """config.yaml, and provenance.json with a record for every time that the run was started."""
    write_text(folder / "config.yaml", yaml.safe_dump(redact_values(to_plain(config)), sort_keys=False))
    hashes = {
        "config": config_hash(config),
        "data": corpus.fingerprint,
        "tokenizer": corpus.tokenizer_sha256,
    }
    if config.init.digest is not None:
        hashes["base"] = config.init.digest
    record = collect(command, {"training": config.seed, "data": config.data.seed}, hashes)
    path = folder / "provenance.json"
    try:
        earlier = read_object(path) if start.step else None
    except (OSError, ValueError):
        earlier = None
    if earlier is not None:
        record = earlier | {"resumed": [*earlier.get("resumed", []), record | {"step": start.step}]}
    write_json(path, record)


def _finish(folder: Path, trainer: pl.Trainer, module: CausalLMModule) -> None:
    record = {
        "step": trainer.global_step,
        "tokens": module.tokens_seen,
        "val_loss": module.val_loss,
        "checkpoint": f"{CHECKPOINTS}/{step_name(trainer.global_step)}",
    }
    write_json(folder / COMPLETE, record)
    log.info("%s: complete at step %d, validation loss %.4f nats/token", folder, record["step"], record["val_loss"])


class _StoppableData(TextDataModule):
    """Its workers ignore the signals that stop a run.

    A scheduler and Ctrl-C signal the whole process group; a worker that dies takes the training process with it
    before that has saved. Workers end when the training process does.
    """

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        loader = super().train_dataloader()
        loader.worker_init_fn = ignore_stop_signals
        return loader

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        loader = super().val_dataloader()
        loader.worker_init_fn = ignore_stop_signals
        return loader


def _rank() -> int:
    """This process's rank, as the launcher's environment or Lightning says."""
    return rank_zero_only.rank  # type: ignore[attr-defined]

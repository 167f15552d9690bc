"""Where a run begins: already complete, at a checkpoint, or at the beginning."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnres.config import agreeing, differences, to_plain
from attnres.data import Corpus
from attnres.errors import CheckpointError, ConfigError
from attnres.files.redaction import redact_values
from attnres.files.run_folder import (
    CHECKPOINTS,
    COMPLETE,
    TRAINING_FILE,
    OtherFormat,
    latest,
    list_steps,
    read_info,
    step_name,
    verify,
)
from attnres.files.whole_files import read_object
from attnres.training.config import TrainConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """Where a run begins: a verified checkpoint folder and its step, or the beginning."""

    checkpoint: Path | None = None
    step: int = 0


def completed(folder: Path, max_steps: int) -> dict[str, Any] | None:
    """`complete.json` of a run whose last checkpoint is intact, else None.

    Raises:
        CheckpointError: its last checkpoint is of another format.
    """
    path = folder / COMPLETE
    if not path.exists():
        return None
    try:
        record = read_object(path)
        done = int(record["step"]) >= max_steps
        verify(folder / CHECKPOINTS / step_name(int(record["step"])))
    except OtherFormat:
        raise
    except (OSError, ValueError, KeyError, TypeError, CheckpointError) as error:
        log.warning("%s says complete, but its checkpoint cannot be used; training goes on: %s", path, error)
        return None
    return record if done else None


def choose_start(config: TrainConfig, folder: Path) -> Start:
    """Applies `resume`.

    `auto` takes the run's newest intact checkpoint, or the beginning; `must` insists on a checkpoint; `never`
    insists on an empty folder. A path (step folder, its `training.ckpt`, or a run folder) seeds a run that
    has no checkpoint of its own yet; a run that has goes on from its own, so that the same command survives a requeue.
    A path inside the run's own folder always wins.

    Raises:
        ConfigError: `never` and there are checkpoints.
        CheckpointError: nothing to resume from where something must be, or nothing intact.
    """
    resume = config.resume
    if resume == "never":
        steps = list_steps(folder)
        if steps:
            raise ConfigError(
                f"resume=never, but {folder} holds checkpoints up to step {max(steps)};"
                " move or delete the folder, or use resume=auto to go on"
            )
        return Start()
    if resume in ("auto", "must"):
        newest = latest(folder)
        if newest is None and resume == "must":
            raise CheckpointError(f"resume=must, but {folder} holds no checkpoint; use resume=auto to start afresh")
        log.info("resume=%s: %s", resume, f"going on from {newest}" if newest else f"starting afresh in {folder}")
        return _start(newest)
    path = Path(resume)
    path = path.parent if path.name == TRAINING_FILE else path
    if not path.is_dir():
        raise CheckpointError(f"resume={resume}: no such folder; give a step folder, a run folder, auto, must or never")
    own = path.resolve().is_relative_to(folder.resolve())
    if not own and list_steps(folder):
        newest = latest(folder)
        log.warning("resume=%s: %s has checkpoints of its own; going on from %s instead", resume, folder, newest)
        return _start(newest)
    if (path / CHECKPOINTS).is_dir():
        newest = latest(path)
        if newest is None:
            raise CheckpointError(f"resume={resume}: holds no checkpoint; choose another run")
        return _start(newest)
    verify(path)
    log.info("resume: going on from %s", path)
    return _start(path)


def check_compatible(config: TrainConfig, corpus: Corpus, checkpoint: Path) -> None:
    """Compares a checkpoint's configuration and data with this run's.

    Raises:
        CheckpointError: listing every field that differs and matters.
    """
    training, data = read_info(checkpoint)
    stored = training.get("config", {})
    if not isinstance(stored, dict):
        raise CheckpointError(f"{checkpoint}: training.json holds no configuration; choose another checkpoint")
    plain = redact_values(to_plain(config))
    differing = differences(agreeing(TrainConfig, stored), agreeing(TrainConfig, plain))
    for name, value in (("fingerprint", corpus.fingerprint), ("tokenizer_sha256", corpus.tokenizer_sha256)):
        if data.get(name) != value:
            differing.append((f"data {name}", data.get(name), value))
    if differing:
        listed = "; ".join(f"{where}: {was!r} there, {now!r} here" for where, was, now in differing)
        raise CheckpointError(
            f"{checkpoint} does not fit this run: {listed}; make them agree, or leave that checkpoint out"
        )


def _start(checkpoint: Path | None) -> Start:
    if checkpoint is None:
        return Start()
    try:
        return Start(checkpoint, int(read_info(checkpoint)[0]["step"]))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{checkpoint}: training.json names no step; choose another checkpoint") from error

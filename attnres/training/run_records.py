"""What a run folder says about its run: config.yaml, provenance.json, complete.json, and the words of its exports."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from attnres.config import to_plain
from attnres.data import Corpus
from attnres.files.provenance import collect
from attnres.files.redaction import redact_values
from attnres.files.run_folder import CHECKPOINTS, COMPLETE, step_name
from attnres.files.whole_files import read_object, write_json, write_text
from attnres.processes.hardware import hardware
from attnres.training.checkpoint import remove_leftovers
from attnres.training.config import TrainConfig, config_hash
from attnres.training.export import ExportInfo
from attnres.training.resume import Start

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """One run that is about to train.

    Attributes:
        config: with `init` filled in.
        command: the command line, for provenance.
    """

    config: TrainConfig
    folder: Path
    corpus: Corpus
    start: Start
    command: str

    @property
    def plain(self) -> dict[str, Any]:
        """The configuration as plain containers, without secrets."""
        return redact_values(to_plain(self.config))

    @property
    def export_info(self) -> ExportInfo:
        """What the run's exports say about it."""
        plain, corpus = self.plain, self.corpus
        return ExportInfo(
            tokenizer_path=Path(corpus.tokenizer_path),
            eos_id=corpus.eos_id,
            training={"name": self.config.name, "seed": self.config.seed, "command": self.command, "config": plain},
            data={
                "fingerprint": corpus.fingerprint,
                "tokenizer_sha256": corpus.tokenizer_sha256,
                "config": plain["data"],
            },
        )


@dataclass(frozen=True)
class End:
    """How far a run came.

    Attributes:
        step: optimizer steps, of this and earlier processes.
        tokens: target tokens seen.
        val_loss: nats/token; None where it was never measured.
        stopped: whether a signal ended the run before its last step.
    """

    step: int
    tokens: int
    val_loss: float | None
    stopped: bool


def record_start(run: Run) -> None:
    """Clears what a killed process left, and writes config.yaml and provenance.json, with a record of every start."""
    remove_leftovers(run.folder)
    (run.folder / COMPLETE).unlink(missing_ok=True)
    write_text(run.folder / "config.yaml", yaml.safe_dump(run.plain, sort_keys=False))
    hashes = {
        "config": config_hash(run.config),
        "data": run.corpus.fingerprint,
        "tokenizer": run.corpus.tokenizer_sha256,
    }
    if run.config.init.digest is not None:
        hashes["base"] = run.config.init.digest
    record = collect(run.command, hardware(), {"training": run.config.seed, "data": run.config.data.seed}, hashes)
    path = run.folder / "provenance.json"
    try:
        earlier = read_object(path) if run.start.step else None
    except (OSError, ValueError):
        earlier = None
    if earlier is not None:
        record = earlier | {"resumed": [*earlier.get("resumed", []), record | {"step": run.start.step}]}
    write_json(path, record)


def record_end(folder: Path, end: End) -> None:
    """Writes complete.json, which says that the run is finished."""
    record = {
        "step": end.step,
        "tokens": end.tokens,
        "val_loss": end.val_loss,
        "checkpoint": f"{CHECKPOINTS}/{step_name(end.step)}",
    }
    write_json(folder / COMPLETE, record)
    log.info("%s: complete at step %d, validation loss %.4f nats/token", folder, end.step, end.val_loss)

"""Token shards from text of any size: the job, its lock, and the folder that appears when it is complete.

The builder works in `OUT.building`, which becomes `OUT`. Killed anywhere, the same command goes on.

Memory: about 0.5 GB that all processes share, and some 0.1 GB for each. Disk: the ids once, plus 400 bytes a document
and a few chunks of 4 MB until the chunks are scattered.
"""

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from attnres.data.config import SPLITS
from attnres.data.corpus.builder import Recipe, build, publish
from attnres.data.corpus.chunks import read_own
from attnres.data.corpus.folder import open_corpus
from attnres.data.corpus.manifest import MANIFEST, SHARDED_FORMAT, write_manifest
from attnres.data.text.streams import Stream
from attnres.data.text.tokenizer import find_tokenizer
from attnres.errors import ConfigError, DataError
from attnres.files.hashes import content_hash, sha256_of
from attnres.files.whole_files import locked, read_object, storage_errors, write_text

logger = logging.getLogger(__name__)

# Workers of a killed process hold its lock for half a second more.
_LOCK_SECONDS = 5.0


@dataclass(frozen=True)
class ShardsConfig:
    """What decides the shards, beside the stream and the tokenizer; see `DataConfig` and `Recipe`.

    Raises:
        ConfigError: A field has an impossible value.
    """

    seed: int = 0
    validation: float = 0.001
    probe_pilot: float = 0.001
    probe_confirm: float = 0.004
    max_document_bytes: int = 16 * 1024**2
    max_bytes: int | None = None
    shard_tokens: int = 2**26

    def __post_init__(self) -> None:
        for name in ("max_document_bytes", "max_bytes", "shard_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')}: expected at least 1, got {value}")
        if self.seed < 0:
            raise ConfigError(f"--seed: expected at least 0, got {self.seed}")
        if min(self.held_out) <= 0 or sum(self.held_out) >= 1:
            raise ConfigError(
                "--validation, --probe-pilot, --probe-confirm: expected fractions above 0 that sum to less than 1, "
                f"got {self.held_out}"
            )

    @property
    def held_out(self) -> tuple[float, ...]:
        """Fractions of the splits that are not trained on, in the order of `SPLITS[1:]`."""
        return tuple(getattr(self, name) for name in SPLITS[1:])


@dataclass(frozen=True)
class Job:
    """What decides a folder of shards.

    Attributes:
        tokenizer: A `tokenizer.json`, or a folder holding one.
        vocab_size: Without `tokenizer`: train one of at most so many entries on documents of the train split, on
            `TOKENIZER_BYTES` of them evenly from files, of a hub's data set on the first ones.

    Raises:
        ConfigError: Both or neither of `tokenizer` and `vocab_size` are given.
    """

    stream: Stream
    config: ShardsConfig
    tokenizer: str | None = None
    vocab_size: int | None = None
    exclude: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        if (self.tokenizer is None) == (self.vocab_size is None):
            raise ConfigError("expected either --tokenizer or --vocab-size; give one of them")

    @cached_property
    def given(self) -> Path | None:
        """The `tokenizer.json` that `tokenizer` names."""
        return None if self.tokenizer is None else find_tokenizer(self.tokenizer)

    def plain(self) -> dict[str, Any]:
        """The job as JSON: two equal ones make the same shards."""
        return {
            "format": SHARDED_FORMAT,
            "source": self.stream.identity(),
            "settings": asdict(self.config),
            "tokenizer": None if self.given is None else sha256_of(self.given),
            "vocab_size": self.vocab_size,
            "exclude": [open_corpus(path).fingerprint for path in self.exclude],
            "tokenizers": tokenizers.__version__,
        }

    def recipe(self) -> Recipe:
        """What the builder is given."""
        config = self.config
        return Recipe(
            stream=self.stream,
            seed=config.seed,
            held_out=config.held_out,
            tokenizer=self.given,
            vocab_size=self.vocab_size,
            no_text="the files or the data set hold no text; give others",
            max_bytes=config.max_bytes,
            max_document_bytes=config.max_document_bytes,
            shard_tokens=config.shard_tokens,
            exclude=self.exclude,
        )


def make_shards(out: Path, job: Job, workers: int = 1, command: str = "") -> Path:
    """Makes the folder `out`, or goes on where a killed process stopped.

    Args:
        out: Folder to make; `data=prepared data.paths=[out]` trains from it.
        workers: Processes that tokenise.
        command: For the manifest: how to make the folder again.

    Raises:
        ConfigError: The work of another job, or of another process, is in the way.
        DataError: The text cannot be read, or there is too little of it; or unfinished work is damaged.
        StorageError: The disk is full or cannot be written.
        Stopped: A worker was killed; the same command goes on.
    """
    plain = job.plain()
    building = out.with_name(f"{out.name}.building")
    with making(out):
        if (out / MANIFEST).is_file():
            _check_complete(out, plain)
            logger.info("%s is already complete", out)
            return out
        if out.exists():
            raise ConfigError(f"{out} exists and is not a folder of token shards; give another --out")
        building.mkdir(parents=True, exist_ok=True)
        _check_begun(building, plain)
        if not (building / MANIFEST).is_file():
            _make(building, job, plain, workers, command)
        publish(building, out)
    return out


@contextmanager
def making(out: Path) -> Iterator[None]:
    """Holds the lock of a folder: nobody else writes it, or what lies beside it under its name.

    Raises:
        ConfigError: Another process holds it.
        StorageError: The disk is full or cannot be written.
    """
    busy = f"{out} is being made by another process; wait for it or give another --out"
    with storage_errors(out, "free space or fix the folder, the same command goes on"):
        out.parent.mkdir(parents=True, exist_ok=True)
        with locked(out.with_name(f"{out.name}.lock"), busy, _LOCK_SECONDS):
            yield


def _make(building: Path, job: Job, plain: dict[str, Any], workers: int, command: str) -> None:
    began, cpu = time.monotonic(), time.process_time()
    about = {
        "source": {key: value for key, value in plain["source"].items() if key != "files"},
        "settings": plain["settings"],
        "seed": job.config.seed,
    }
    manifest, read = build(building, job.recipe(), about, workers)
    throughput = {
        "cpu_seconds": round(read.cpu_seconds, 1),
        "tokens_per_second_per_core": round(read.tokens / max(read.cpu_seconds, 1e-9)),
        "megabytes_per_second_per_core": round(read.bytes / 1e6 / max(read.cpu_seconds, 1e-9), 2),
        "workers": workers,
        "last_session_seconds": round(time.monotonic() - began, 1),
        "last_session_cpu_seconds_of_the_reading_process": round(time.process_time() - cpu, 1),
    }
    manifest |= {
        "bytes": read.bytes,
        "tokens": read.tokens,
        "left_out": {
            "blank": read.blank,
            "excluded": sum(read.counts) - manifest["documents"],
            "too_long": len(read.left_out),
            "too_long_names": read.left_out[:100],
        },
        "throughput": throughput,
        "job_sha256": content_hash(plain, spaced=True),
        "command": command,
    }
    write_manifest(building, manifest)
    logger.info(
        "%s documents, %.0f MB, %s tokens; %s tokens/s per core",
        f"{manifest['documents']:,}", read.bytes / 1e6, f"{read.tokens:,}",
        f"{throughput['tokens_per_second_per_core']:,}",
    )  # fmt: skip


def _check_complete(out: Path, plain: dict[str, Any]) -> None:
    try:
        made_by = read_object(out / MANIFEST).get("job_sha256")
    except (OSError, ValueError) as error:
        raise DataError(f"{out / MANIFEST} is unreadable ({error}); delete {out} or give another --out") from error
    if made_by != content_hash(plain, spaced=True):
        raise ConfigError(f"{out} was made with other settings or from other text; give another --out")


def _check_begun(building: Path, plain: dict[str, Any]) -> None:
    path = building / "job.json"
    if not path.is_file():
        write_text(path, json.dumps(plain))
        return
    earlier, now = read_own(path, building, {}), json.loads(json.dumps(plain))
    if differing := [key for key in now if earlier.get(key) != now[key]]:
        raise ConfigError(
            f"{building} holds unfinished work that differs in {', '.join(differing)}; delete it, or run the command "
            "that began it"
        )

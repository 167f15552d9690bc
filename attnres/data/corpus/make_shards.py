"""`python -m attnres.commands.make_shards`: streams text through a tokenizer into a folder of token shards.

Three stages in `OUT.building`, which becomes `OUT` when complete:
    1. One process reads the stream and cuts it into chunks; the others tokenise, hash and sign one chunk each and
       commit it by a rename.
    2. Near-duplicates are grouped and every group gets its split (`attnres.data.corpus.grouping`).
    3. The chunks' ids go to the shards of their splits, and the chunks are deleted (`attnres.data.corpus.scatter`).
Killed anywhere, the same command goes on: stage 1 behind its last chunk, stage 2 from its beginning, stage 3 from its
last synced place. The result depends on the text, the tokenizer and the settings, never on how often it was killed or
how many processes there were.

Memory: about 0.5 GB that all processes share, and some 0.1 GB for each. Disk: the ids once, plus 400 bytes a document
and a few chunks of 4 MB until stage 3 ends.
"""

import argparse
import dataclasses
import errno
import hashlib
import json
import logging
import multiprocessing
import os
import platform
import re
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import tokenizers
from filelock import FileLock, Timeout
from tokenizers import Tokenizer

from attnres.data.config import MIN_VOCAB_SIZE, SPLITS
from attnres.data.corpus.build import TOKENIZER_BYTES
from attnres.data.corpus.chunks import Chunk, committed, read_chunks, write_chunk
from attnres.data.corpus.corpus import (
    DOCUMENTS,
    MANIFEST,
    SHARDED_FORMAT,
    TOKENIZER,
    manifest_sha256,
    open_corpus,
)
from attnres.data.corpus.grouping import Signatures, group_on_disk, write_documents
from attnres.data.corpus.scatter import scatter, write_atomically
from attnres.data.corpus.shards import digest, token_dtype
from attnres.data.corpus.splits import split_of, uniform
from attnres.data.text.streams import FileStream, HubStream, Stream, resolve_revision
from attnres.data.text.tokenizer import end_of_text_id, find_tokenizer, load_tokenizer, train_tokenizer, vocabulary_size
from attnres.errors import AttnResError, ConfigError, DataError, Stopped, StorageError

logger = logging.getLogger(__name__)

FINEWEB_EDU = ("HuggingFaceFW/fineweb-edu", "sample-10BT")
_PROGRESS_SECONDS = 10.0
_WORKING_FILES = ("chunks", "job.json", "stream.json", "splits.npy", "scatter.json")


@dataclass(frozen=True)
class Settings:
    """What decides the shards, beside the stream and the tokenizer.

    Attributes:
        seed: Decides the split of each document.
        validation: Expected fraction of documents in the validation split.
        probe_pilot: Expected fraction from which a probe picks hypotheses.
        probe_confirm: Expected fraction on which a probe tests them; the rest is "train".
        max_document_bytes: Longer documents are left out, by name.
        max_bytes: Stop before the text exceeds this; None reads all of it.
        shard_tokens: Most tokens of a shard.

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


def make_shards(
    out: Path,
    stream: Stream,
    settings: Settings,
    tokenizer: str | None = None,
    vocab_size: int | None = None,
    exclude: Sequence[Path] = (),
    workers: int = 1,
    command: str = "",
) -> Path:
    """Makes the folder `out`, or goes on where a killed process stopped.

    Args:
        out: Folder to make; `data=prepared data.paths=[out]` trains from it.
        stream: Where the text comes from.
        settings: What decides the shards.
        tokenizer: A `tokenizer.json`, or a folder holding one.
        vocab_size: Without `tokenizer`: train one of at most so many entries on documents of the train split, on
            `TOKENIZER_BYTES` of them evenly from files, of a hub's data set on the first ones.
        exclude: Prepared folders of the same tokenizer; their texts are left out.
        workers: Processes that tokenise.
        command: For the manifest: how to make the folder again.

    Raises:
        ConfigError: Settings that do not fit, or the work of other settings is in the way.
        DataError: The text cannot be read, or there is too little of it.
        StorageError: The disk is full or cannot be written.
        Stopped: A worker was killed; the same command goes on.
    """
    if (tokenizer is None) == (vocab_size is None):
        raise ConfigError("expected either --tokenizer or --vocab-size; give one of them")
    given = None if tokenizer is None else find_tokenizer(tokenizer)
    job = {
        "format": SHARDED_FORMAT,
        "source": stream.identity(),
        "settings": dataclasses.asdict(settings),
        "tokenizer": None if given is None else digest(given)["sha256"],
        "vocab_size": vocab_size,
        "exclude": [open_corpus(path).fingerprint for path in exclude],
        "tokenizers": tokenizers.__version__,
    }
    building = out.with_name(f"{out.name}.building")
    with _refusals(out), _locked(out):
        if (out / MANIFEST).is_file():
            if json.loads((out / MANIFEST).read_text(encoding="utf-8")).get("job_sha256") != _sha256(job):
                raise ConfigError(f"{out} was made with other settings or from other text; give another --out")
            logger.info("%s is already complete", out)
            return out
        if out.exists():
            raise ConfigError(f"{out} exists and is not a folder of token shards; give another --out")
        building.mkdir(parents=True, exist_ok=True)
        _same_job(building, job)
        if not (building / MANIFEST).is_file():
            _Work(building, stream, settings, given, vocab_size, tuple(exclude), workers).run(job, command)
        for name in _WORKING_FILES:
            path = building / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        os.replace(building, out)
    return out


@dataclass
class _Work:
    folder: Path
    stream: Stream
    settings: Settings
    tokenizer: Path | None
    vocab_size: int | None
    exclude: tuple[Path, ...]
    workers: int

    def run(self, job: dict[str, Any], command: str) -> None:
        began, cpu = time.monotonic(), time.process_time()
        tokenizer = self._tokenizer()
        eos_id = end_of_text_id(tokenizer, self.tokenizer or self.folder / TOKENIZER)
        dtype = token_dtype(vocabulary_size(tokenizer))
        read = self._tokenise(tokenizer, eos_id, dtype)
        counts = read["counts"]
        splits = self._split(counts)
        shards = scatter(
            self.folder, self.folder / "chunks", counts, splits, dtype, self.settings.shard_tokens,
            lambda done: logger.info("shards: %d of %d chunks", done, len(counts)),
        )  # fmt: skip
        files = {name: digest(self.folder / name) for name in (TOKENIZER, DOCUMENTS)}
        for entries in shards.values():
            files |= entries
        table = pq.ParquetFile(self.folder / DOCUMENTS)
        rates = {
            # Reading, hashing, signing and tokenising: all of stage 1, over every session.
            "cpu_seconds": round(read["cpu_seconds"], 1),
            "tokens_per_second_per_core": round(read["tokens"] / max(read["cpu_seconds"], 1e-9)),
            "megabytes_per_second_per_core": round(read["bytes"] / 1e6 / max(read["cpu_seconds"], 1e-9), 2),
            "workers": self.workers,
            "last_session_seconds": round(time.monotonic() - began, 1),
            "last_session_cpu_seconds_of_the_reading_process": round(time.process_time() - cpu, 1),
        }
        manifest: dict[str, Any] = {
            "format": SHARDED_FORMAT,
            "fingerprint": _fingerprint(files, shards, table),
            "source": {key: value for key, value in job["source"].items() if key != "files"},
            "settings": job["settings"],
            "seed": self.settings.seed,
            "documents": table.metadata.num_rows,
            "near_duplicate_groups": _groups(table),
            "bytes": read["bytes"],
            "tokens": read["tokens"],
            "left_out": {
                "blank": read["blank"],
                "excluded": int((splits < 0).sum()),
                "too_long": len(read["left_out"]),
                "too_long_names": read["left_out"][:100],
            },
            "splits": {
                split: {
                    "documents": int((splits == index).sum()),
                    "tokens": sum(entry["bytes"] for entry in shards[split].values()) // dtype.itemsize,
                    "shards": list(shards[split]),
                }
                for index, split in enumerate(SPLITS)
            },
            "vocab_size": vocabulary_size(tokenizer),
            "eos_id": eos_id,
            "dtype": dtype.str,
            "files": files,
            "throughput": rates,
            "versions": {"python": platform.python_version(), "tokenizers": tokenizers.__version__},
            "job_sha256": _sha256(job),
            "command": command,
        }
        manifest["sha256_of_the_rest"] = manifest_sha256(manifest)
        write_atomically(self.folder / MANIFEST, json.dumps(manifest, indent=1))
        logger.info(
            "%s documents, %.0f MB, %s tokens; %s tokens/s per core",
            f"{manifest['documents']:,}", read["bytes"] / 1e6, f"{read['tokens']:,}",
            f"{rates['tokens_per_second_per_core']:,}",
        )  # fmt: skip

    def _tokenizer(self) -> Tokenizer:
        """The given tokenizer, or one that is trained first."""
        path = self.folder / TOKENIZER
        if self.tokenizer is not None:
            shutil.copyfile(self.tokenizer, path)
        elif not path.is_file():
            assert self.vocab_size is not None
            logger.info("training a tokenizer of %d entries", self.vocab_size)
            trained = train_tokenizer(self._sample(), self.vocab_size)
            temporary = path.with_name(f".{path.name}")
            trained.save(str(temporary))
            os.replace(temporary, path)
        return load_tokenizer(path)

    def _sample(self) -> Iterator[str]:
        """Texts whose own hash puts them into the train split."""
        share = min(1.0, TOKENIZER_BYTES / max(1, self.stream.bytes or 1))
        size, settings = 0, self.settings
        for document, _ in self.stream.read(None):
            raw = document.text.encode()
            key = hashlib.sha256(raw).digest()
            if len(raw) > settings.max_document_bytes or split_of(settings.seed, settings.held_out, key) != 0:
                continue
            if uniform(settings.seed, b"tokenizer:" + key) < share:
                size += len(raw)
                if size > TOKENIZER_BYTES:
                    return
                yield document.text

    def _tokenise(self, tokenizer: Tokenizer, eos_id: int, dtype: np.dtype) -> dict[str, Any]:
        """Stage 1; returns the counts over all chunks."""
        path, chunks = self.folder / "stream.json", self.folder / "chunks"
        if path.is_file():
            return json.loads(path.read_text(encoding="utf-8"))
        chunks.mkdir(exist_ok=True)
        metas = committed(chunks)
        if metas:
            logger.info("going on behind chunk %d (%d documents)", len(metas), sum(m["documents"] for m in metas))
        total = _Total(metas)
        # Workers start before anything is read, so that they share this process's memory and none of its threads.
        context = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(self.workers, context, _start, (chunks, tokenizer, eos_id, dtype)) as pool:
            pool.submit(_work, None).result()
            limit = float("inf") if self.settings.max_bytes is None else self.settings.max_bytes - total.bytes
            state = metas[-1]["state"] if metas else None
            pending: set[Future[dict[str, Any] | None]] = set()
            try:
                for chunk in read_chunks(self.stream, state, len(metas), self.settings.max_document_bytes, limit):
                    while len(pending) > self.workers:
                        done, pending = wait(pending, return_when=FIRST_COMPLETED)
                        total.add(future.result() for future in done)
                    pending.add(pool.submit(_work, chunk))
                total.add(future.result() for future in wait(pending).done)
            except BrokenProcessPool as error:
                raise Stopped(
                    f"{self.folder}: a worker was killed (out of memory?); the same command goes on, --workers "
                    f"{max(1, self.workers // 2)} needs less memory"
                ) from error
        metas = committed(chunks)
        found = {
            "counts": [meta["documents"] for meta in metas],
            "blank": sum(meta["blank"] for meta in metas),
            "left_out": [item for meta in metas for item in meta["left_out"]],
        } | {key: sum(meta[key] for meta in metas) for key in ("tokens", "bytes", "cpu_seconds")}
        if not found["tokens"]:
            raise DataError(f"{self.stream.identity()}: no text; give other files")
        write_atomically(path, json.dumps(found))
        return found

    def _split(self, counts: list[int]) -> Any:
        """Stage 2; returns the split of each document."""
        path = self.folder / "splits.npy"
        if not path.is_file():
            chunks = self.folder / "chunks"
            logger.info("grouping near-duplicates among %d documents", sum(counts))
            groups = group_on_disk(Signatures(chunks, counts))
            excluded = [open_corpus(folder).content for folder in self.exclude]
            splits = write_documents(
                self.folder / DOCUMENTS, chunks, counts, groups, self.settings.seed, self.settings.held_out,
                np.unique(np.concatenate(excluded)) if excluded else np.empty(0, np.uint64),
            )  # fmt: skip
            temporary = path.with_name(f".{path.name}")
            np.save(temporary, splits)
            os.replace(temporary, path)
        return np.load(path)


class _Total:
    """Counts of what is committed, and a line in the log now and then."""

    def __init__(self, metas: list[dict[str, Any]]) -> None:
        self.documents, self.bytes, self.tokens, self.cpu_seconds = 0, 0, 0, 0.0
        self._began = self._told = time.monotonic()
        self._count(metas)
        self._tokens_before = self.tokens

    def add(self, metas: Iterator[dict[str, Any] | None]) -> None:
        self._count([meta for meta in metas if meta is not None])
        now = time.monotonic()
        if now - self._told > _PROGRESS_SECONDS:
            self._told = now
            logger.info(
                "%s documents, %.0f MB, %s tokens; %s tokens/s, %s tokens/s per core",
                f"{self.documents:,}", self.bytes / 1e6, f"{self.tokens:,}",
                f"{(self.tokens - self._tokens_before) / (now - self._began):,.0f}",
                f"{self.tokens / self.cpu_seconds:,.0f}",
            )  # fmt: skip

    def _count(self, metas: Sequence[dict[str, Any]]) -> None:
        for meta in metas:
            self.documents += meta["documents"]
            self.bytes += meta["bytes"]
            self.tokens += meta["tokens"]
            self.cpu_seconds += meta["cpu_seconds"]


# What a worker process needs for every chunk; set once in it, by `_start`.
_worker: tuple[Path, Tokenizer, int, np.dtype] | None = None


def _start(chunks: Path, tokenizer: Tokenizer, eos_id: int, dtype: np.dtype) -> None:
    global _worker
    _worker = (chunks, tokenizer, eos_id, dtype)
    # Ctrl-C reaches the whole group; the reading process ends the others when their chunks are written.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    """Ends this worker when the process that started it is gone: it would wait for work forever, holding the lock."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _work(chunk: Chunk | None) -> dict[str, Any] | None:
    assert _worker is not None
    chunks, tokenizer, eos_id, dtype = _worker
    if chunk is None:
        return None
    meta = write_chunk(chunks, chunk, tokenizer, eos_id, dtype)
    return {key: meta[key] for key in ("documents", "bytes", "tokens", "cpu_seconds")}


def _fingerprint(files: dict[str, Any], shards: dict[str, dict[str, Any]], table: pq.ParquetFile) -> str:
    """Hash of what a model can see: tokens, boundaries, splits and tokenizer, but no names or versions."""
    sha256 = hashlib.sha256()
    for name in (*(name for split in SPLITS for name in shards[split]), TOKENIZER):
        sha256.update(bytes.fromhex(files[name]["sha256"]))
    for column in ("split", "start", "tokens"):
        for batch in table.iter_batches(columns=[column]):
            sha256.update(batch.column(0).to_numpy().astype("<i8").tobytes())
    return sha256.hexdigest()


def _groups(table: pq.ParquetFile) -> int:
    count = first = 0
    for batch in table.iter_batches(columns=["group"]):
        group = batch.column(0).to_numpy()
        count += int((group == np.arange(first, first + len(group))).sum())
        first += len(group)
    return count


def _same_job(folder: Path, job: dict[str, Any]) -> None:
    path = folder / "job.json"
    if not path.is_file():
        write_atomically(path, json.dumps(job))
        return
    earlier, now = json.loads(path.read_text(encoding="utf-8")), json.loads(json.dumps(job))
    differing = [key for key in now if earlier.get(key) != now[key]]
    if differing:
        raise ConfigError(
            f"{folder} holds unfinished work that differs in {', '.join(differing)}; delete it, or run the command "
            "that began it"
        )


def _sha256(job: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    out.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out.with_name(f"{out.name}.lock"))
    try:
        # Workers of a killed process hold it for half a second more.
        lock.acquire(timeout=5)
    except Timeout:
        raise ConfigError(f"{out} is being made by another process; wait for it or give another --out") from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _refusals(out: Path) -> Iterator[None]:
    """Names the folder where the system refuses to write."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO):
            raise
        raise StorageError(
            f"{out}: {error.strerror}; free space or fix the folder, the same command goes on"
        ) from error


def _find_tokenizer(given: str) -> str:
    """A path as it is; a hub id such as Qwen/Qwen3-0.6B as the folder that its two files were downloaded to."""
    if Path(given).expanduser().exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", given):
        return given
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(given, allow_patterns=["tokenizer.json", "tokenizer_config.json"])
    except (OSError, ValueError) as error:
        raise DataError(
            f"--tokenizer: {given} is no file here and cannot be read from the hub "
            f"({' '.join(str(error).split())[:200]}); give a tokenizer.json"
        ) from error


def _stream(arguments: argparse.Namespace, out: Path) -> Stream:
    if arguments.paths:
        return FileStream(tuple(arguments.paths), arguments.text_column)
    name, config = arguments.hub, arguments.hub_config
    if name is None:
        name, config = FINEWEB_EDU[0], config or FINEWEB_EDU[1]
    asked = f"{name}@{arguments.revision}"
    remembered = out.with_name(f"{out.name}.revision")
    # A branch may move on while this is interrupted; the commit that was begun with is finished with.
    known = json.loads(remembered.read_text(encoding="utf-8")) if remembered.is_file() else {}
    if asked not in known:
        known = {asked: resolve_revision(name, arguments.revision)}
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(remembered, json.dumps(known))
    return HubStream(name, config, arguments.hub_split, known[asked], arguments.text_column)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m attnres.commands.make_shards",
        description="Stream text through a tokenizer into token shards for data=prepared. Killed, it goes on.",
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder to make")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--hub", help="a Hugging Face data set; default HuggingFaceFW/fineweb-edu, sample-10BT")
    source.add_argument("--paths", nargs="+", help=".txt, .jsonl or .parquet files, folders of them, or globs")
    add("--hub-config", help="configuration of the data set")
    add("--hub-split", default="train", help="split of the data set")
    add("--revision", default="main", help="branch, tag or commit of the data set")
    add("--text-column", default="text", help="column or field that holds the text")
    add("--tokenizer", help="a tokenizer.json, a folder with one, or a hub id such as Qwen/Qwen3-0.6B")
    add("--vocab-size", type=int, help="train a byte-level BPE of at most so many entries instead")
    add("--exclude", type=Path, nargs="+", default=[], help="prepared folders whose texts are left out")
    add("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes that tokenise")
    for field in dataclasses.fields(Settings):
        kind = float if isinstance(field.default, float) else int
        add(f"--{field.name.replace('_', '-')}", type=kind, default=field.default)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Makes a folder of token shards, prints its path, returns the exit code."""
    # One process per core, each with one thread: faster than the library's own threads.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
    for noisy in ("httpx", "filelock", "datasets", "huggingface_hub"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    given = _parser().parse_args(arguments)
    words = sys.argv[1:] if arguments is None else list(arguments)
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        if given.workers < 1:
            raise ConfigError(f"--workers: expected at least 1, got {given.workers}")
        if given.vocab_size is not None and given.vocab_size < MIN_VOCAB_SIZE:
            raise ConfigError(f"--vocab-size: expected at least {MIN_VOCAB_SIZE}, got {given.vocab_size}")
        settings = Settings(**{field.name: getattr(given, field.name) for field in dataclasses.fields(Settings)})
        tokenizer = None if given.tokenizer is None else _find_tokenizer(given.tokenizer)
        made = make_shards(
            given.out, _stream(given, given.out), settings, tokenizer, given.vocab_size, given.exclude, given.workers,
            shlex.join(["python", "-m", "attnres.commands.make_shards", *words]),
        )  # fmt: skip
    except AttnResError as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return error.code
    except KeyboardInterrupt:
        sys.stderr.write(f"error: {given.out}: stopped by a signal; the same command goes on\n")
        return Stopped.code
    finally:
        signal.signal(signal.SIGTERM, previous)
    sys.stdout.write(f"{made}\n")
    return 0


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt

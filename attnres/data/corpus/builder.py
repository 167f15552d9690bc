"""The one builder of corpora: what a `Recipe` decides, made on disk in stages, in a folder of their own.

    read      the stream is cut into chunks; each is signed and tokenised, and committed by a rename
    split     near-duplicates are grouped, every group gets its split, the table of documents is written
    scatter   the chunks' ids go to the shards of their splits, and the chunks are deleted

A small corpus that is to train its tokenizer is signed and split first, so that the tokenizer sees exactly the train
split; then the text is read again. Called again after a kill, the builder goes on: `read` behind its last chunk,
`split` from its beginning, `scatter` from its last synced place. The result depends on the recipe alone, never on how
often the builder was killed or how many processes there were.
"""

import hashlib
import json
import logging
import os
import platform
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import tokenizers
from numpy.typing import NDArray

from attnres import faults
from attnres.data.config import SPLITS
from attnres.data.corpus import manifest as manifests
from attnres.data.corpus import splits as splitting
from attnres.data.corpus.chunks import (
    RECORD,
    Chunk,
    Chunks,
    Encoder,
    committed,
    damaged,
    read_chunks,
    read_own,
    write_chunk,
)
from attnres.data.corpus.folder import open_corpus
from attnres.data.corpus.grouping import group_near_duplicates
from attnres.data.corpus.manifest import DOCUMENTS, FORMAT, SHARDED_FORMAT, TOKENIZER
from attnres.data.corpus.scatter import STATE, scatter
from attnres.data.corpus.shards import digest, token_dtype
from attnres.data.corpus.table import count_groups, write_table
from attnres.data.corpus.workers import Progress, write_in_processes
from attnres.data.text.streams import Stream
from attnres.data.text.tokenizer import end_of_text_id, load_tokenizer, train_tokenizer, vocabulary_size
from attnres.errors import DataError
from attnres.files.whole_files import whole_file, write_text

logger = logging.getLogger(__name__)

_WORKING_FILES = ("signed", "chunks", "job.json", "stream.json", "splits.npy", STATE)
_Grouped = tuple[NDArray[np.integer], NDArray[np.int8]]


@dataclass(frozen=True)
class Recipe:
    """What decides a corpus.

    Attributes:
        stream: Where the text comes from.
        seed: Decides the split of each document.
        held_out: Fractions of the splits that are not trained on, in the order of `SPLITS[1:]`.
        tokenizer: A `tokenizer.json`, or None to train one.
        vocab_size: Most entries of a tokenizer that is trained.
        no_text: What the error says where the stream holds no text.
        max_bytes: Stop before the text exceeds this; None reads all of it.
        max_document_bytes: Longer documents are left out, by name; None keeps all.
        shard_tokens: Most tokens of a shard; None makes a small corpus, of format 1.
        exclude: Corpora of the same tokenizer; their texts are left out.
    """

    stream: Stream
    seed: int
    held_out: tuple[float, ...]
    tokenizer: Path | None
    vocab_size: int | None
    no_text: str
    max_bytes: int | None = None
    max_document_bytes: int | None = None
    shard_tokens: int | None = None
    exclude: tuple[Path, ...] = ()

    @property
    def sharded(self) -> bool:
        """Whether the corpus may have any size."""
        return self.shard_tokens is not None

    def option(self, name: str) -> str:
        """How the user spells a field of `DataConfig`."""
        return f"--{name.replace('_', '-')}" if self.sharded else f"data.{name}"

    def split_of(self, key: bytes) -> int:
        """The split of a group by its smallest content hash."""
        return splitting.split_of(self.seed, self.held_out, key)

    def chunks(self, metas: Sequence[dict[str, Any]] = ()) -> Iterator[Chunk]:
        """The chunks of the text behind those of `metas`."""
        state = metas[-1].get("state") if metas else None
        left = float("inf") if self.max_bytes is None else self.max_bytes - sum(meta["bytes"] for meta in metas)
        longest = float("inf") if self.max_document_bytes is None else self.max_document_bytes
        return read_chunks(self.stream, state, len(metas), longest, left)


@dataclass(frozen=True)
class Read:
    """What stage `read` gave.

    Attributes:
        counts: Documents of each chunk.
        blank: Documents without text.
        left_out: Documents that are longer than allowed, by name, with their bytes.
        tokens: Ids in all chunks.
        bytes: Of the text of their documents.
        cpu_seconds: Of reading, hashing, signing and tokenising, over every session.
    """

    counts: list[int]
    blank: int
    left_out: list[Any]
    tokens: int
    bytes: int
    cpu_seconds: float


def build(folder: Path, recipe: Recipe, about: dict[str, Any], workers: int = 0) -> tuple[dict[str, Any], Read]:
    """Makes all files of a corpus but its manifest, or goes on where a killed process stopped.

    Args:
        about: Where the text came from, for the manifest.
        workers: Processes that tokenise; 0 uses this one.

    Returns:
        What the manifest must hold, and what was read.

    Raises:
        DataError: The text cannot be read, changed in between, or there is too little of it.
        OSError: The disk is full or cannot be written.
        Stopped: A worker was killed.
    """
    path = folder / TOKENIZER
    signed = grouped = None
    if recipe.tokenizer is not None:
        shutil.copyfile(recipe.tokenizer, path)
    elif not recipe.sharded:
        signed = _sign(folder / "signed", recipe)
        grouped = _group(signed, recipe)
        _train(path, _texts_of_the_train_split(recipe, signed, grouped[1]), recipe)
    elif not path.is_file():
        _train(path, _texts_that_hash_into_train(recipe), recipe)
    tokenizer = load_tokenizer(path)
    eos_id, dtype = end_of_text_id(tokenizer, recipe.tokenizer or path), token_dtype(vocabulary_size(tokenizer))
    encoder = Encoder(tokenizer, eos_id, dtype, whole=not recipe.sharded)
    read = _read(folder, recipe, encoder, signed, workers)
    chunks = Chunks(folder / "chunks", tuple(read.counts))
    splits = _split(folder, chunks, recipe, grouped)
    shards = scatter(folder, chunks, splits, encoder.dtype, recipe.shard_tokens)
    return _manifest(folder, recipe, about, encoder, shards), read


def publish(building: Path, final: Path) -> None:
    """Gives a complete corpus its final name, without what only its builder needed."""
    for name in _WORKING_FILES:
        path = building / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    faults.point("corpus.rename")
    os.replace(building, final)


def _sign(folder: Path, recipe: Recipe) -> Chunks:
    """Chunks without ids."""
    folder.mkdir()
    metas = [write_chunk(folder, chunk, None) for chunk in recipe.chunks()]
    return Chunks(folder, tuple(_counted(metas, recipe).counts))


def _read_again(recipe: Recipe, signed: Chunks) -> Iterator[tuple[Chunk, NDArray[np.void]]]:
    """The chunks of the text with their records, insisting that the documents are those that were signed."""
    number = -1
    for number, chunk in enumerate(recipe.chunks()):
        records = signed.records(number) if number < len(signed) else np.empty(0, RECORD)
        for index, document in enumerate(chunk.documents):
            sha256 = hashlib.sha256(document.text.encode()).digest()
            if index >= len(records) or sha256 != records["sha256"][index].tobytes():
                raise DataError(f"document {document.name} changed while being read; run the command again")
        if len(chunk.documents) < len(records):
            break
        yield chunk, records
    else:
        if number + 1 == len(signed):
            return
    raise DataError(f"{recipe.option('source')}: documents were lost while being read; run the command again")


def _texts_of_the_train_split(recipe: Recipe, signed: Chunks, splits: NDArray[np.int8]) -> Iterator[str]:
    """Of more than `TOKENIZER_BYTES`, an even sample."""
    in_train = splits == SPLITS.index("train")
    sizes = np.concatenate([signed.records(number)["bytes"] for number in range(len(signed))])
    share = min(1.0, splitting.TOKENIZER_BYTES / float(sizes[in_train].sum()))
    if share < 1:
        logger.info("training the tokenizer on %.0f%% of the train split's documents", 100 * share)

    def texts() -> Iterator[tuple[str, bytes]]:
        for (chunk, records), first in zip(_read_again(recipe, signed), signed.firsts, strict=False):
            for index, document in enumerate(chunk.documents):
                if in_train[first + index]:
                    yield document.text, records["sha256"][index].tobytes()

    return splitting.sample_texts(texts(), recipe.seed, share)


def _texts_that_hash_into_train(recipe: Recipe) -> Iterator[str]:
    """Texts whose own hash puts them into the train split: `TOKENIZER_BYTES` of them, evenly if their size is known."""
    longest = float("inf") if recipe.max_document_bytes is None else recipe.max_document_bytes

    def texts() -> Iterator[tuple[str, bytes]]:
        for document, _ in recipe.stream.read(None):
            raw = document.text.encode()
            key = hashlib.sha256(raw).digest()
            if len(raw) <= longest and recipe.split_of(key) == SPLITS.index("train"):
                yield document.text, key

    most = splitting.TOKENIZER_BYTES
    return splitting.sample_texts(texts(), recipe.seed, min(1.0, most / max(1, recipe.stream.bytes or 1)), most)


def _train(path: Path, texts: Iterator[str], recipe: Recipe) -> None:
    assert recipe.vocab_size is not None
    logger.info("training a tokenizer of %d entries", recipe.vocab_size)
    trained = train_tokenizer(texts, recipe.vocab_size)
    with whole_file(path) as temporary:
        trained.save(str(temporary))


def _read(folder: Path, recipe: Recipe, encoder: Encoder, signed: Chunks | None, workers: int) -> Read:
    """Stage `read`."""
    path, chunks = folder / "stream.json", folder / "chunks"
    if path.is_file():
        kinds = {"counts": list, "blank": int, "left_out": list, "tokens": int, "bytes": int, "cpu_seconds": float}
        plain = read_own(path, folder, kinds)
        return Read(**{key: plain[key] for key in kinds})
    chunks.mkdir(exist_ok=True)
    metas = committed(chunks)
    if metas:
        logger.info("going on behind chunk %d (%d documents)", len(metas), sum(m["documents"] for m in metas))
    if workers:
        write_in_processes(recipe.chunks(metas), folder, encoder, workers, Progress(metas))
    else:
        again = _read_again(recipe, signed) if signed else ((chunk, None) for chunk in recipe.chunks(metas))
        for chunk, records in again:
            faults.point("corpus.shards")
            write_chunk(chunks, chunk, encoder, records)
    read = _counted(committed(chunks), recipe)
    write_text(path, json.dumps(asdict(read)))
    return read


def _counted(metas: Iterable[dict[str, Any]], recipe: Recipe) -> Read:
    metas = list(metas)
    totals = {key: sum(meta[key] for meta in metas) for key in ("blank", "tokens", "bytes", "cpu_seconds")}
    read = Read(
        counts=[meta["documents"] for meta in metas],
        left_out=[item for meta in metas for item in meta["left_out"]],
        **totals,
    )
    if not sum(read.counts):
        raise DataError(recipe.no_text)
    return read


def _group(chunks: Chunks, recipe: Recipe) -> _Grouped:
    """The group and the split of each document."""
    groups = group_near_duplicates(chunks, bounded=recipe.sharded)
    excluded = [open_corpus(folder).content for folder in recipe.exclude]
    keys = np.unique(np.concatenate(excluded)) if excluded else np.empty(0, np.uint64)
    splits = splitting.decide_splits(chunks, groups, keys, recipe.split_of)
    splitting.check_splits(splits, len(np.unique(groups)), recipe.option)
    faults.point("corpus.read")
    return groups, splits


def _split(folder: Path, chunks: Chunks, recipe: Recipe, grouped: _Grouped | None) -> NDArray[np.int8]:
    """Stage `split`."""
    path = folder / "splits.npy"
    if not path.is_file():
        if recipe.sharded:
            logger.info("grouping near-duplicates among %d documents", chunks.firsts[-1])
        groups, splits = grouped or _group(chunks, recipe)
        write_table(folder / DOCUMENTS, chunks, groups, splits, recipe.sharded)
        with whole_file(path) as temporary, temporary.open("wb") as file:
            np.save(file, splits)
    try:
        splits = np.load(path)
    except (OSError, ValueError, EOFError) as error:
        raise damaged(path, folder) from error
    if not isinstance(splits, np.ndarray) or splits.shape != (chunks.firsts[-1],) or splits.dtype != np.int8:
        raise damaged(path, folder)
    return splits


def _manifest(
    folder: Path, recipe: Recipe, about: dict[str, Any], encoder: Encoder, shards: dict[str, dict[str, dict[str, Any]]]
) -> dict[str, Any]:
    files = {name: digest(folder / name) for name in (TOKENIZER, DOCUMENTS)}
    for entries in shards.values():
        files |= entries
    in_order = [name for split in SPLITS for name in shards[split]]
    table = pq.read_table(folder / DOCUMENTS, columns=["split"])["split"].to_numpy()
    splits: dict[str, Any] = {
        split: {
            "documents": int((table == index).sum()),
            "tokens": sum(entry["bytes"] for entry in shards[split].values()) // encoder.dtype.itemsize,
        }
        for index, split in enumerate(SPLITS)
    }
    if recipe.sharded:
        splits = {split: entry | {"shards": list(shards[split])} for split, entry in splits.items()}
    return {
        "format": SHARDED_FORMAT if recipe.sharded else FORMAT,
        "fingerprint": manifests.fingerprint(folder, files, in_order),
        **about,
        "documents": len(table),
        "near_duplicate_groups": count_groups(folder / DOCUMENTS),
        "splits": splits,
        "vocab_size": vocabulary_size(encoder.tokenizer),
        "eos_id": encoder.eos_id,
        "dtype": encoder.dtype.str,
        "files": files,
        "versions": {"python": platform.python_version(), "tokenizers": tokenizers.__version__},
    }

"""From a `DataConfig` to a corpus on disk: group, split, train the tokenizer, tokenise; or open it.

The text is read three times instead of being held in memory: once to group and split, once to train the
tokenizer on the train split, once to write the shards. What stays in memory is about 500 bytes per document.
"""

import errno
import hashlib
import json
import logging
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tokenizers
from filelock import FileLock
from numpy.typing import NDArray
from tokenizers import Tokenizer

from attnres import faults
from attnres.data.config import SPLITS, DataConfig
from attnres.data.corpus.corpus import DOCUMENTS, FORMAT, MANIFEST, TOKENIZER, Corpus, manifest_sha256, open_corpus
from attnres.data.corpus.duplicates import group_near_duplicates, minhash_signature
from attnres.data.corpus.shards import ShardWriter, digest, sync_and_close, token_dtype
from attnres.data.corpus.splits import split_of, uniform
from attnres.data.text.sources import Document, listing, read_documents
from attnres.data.text.tokenizer import (
    end_of_text_id,
    find_tokenizer,
    load_tokenizer,
    train_tokenizer,
    vocabulary_size,
)
from attnres.data.windows.mixing import mixture
from attnres.errors import DataError, StorageError

logger = logging.getLogger(__name__)

# Pair counts settle long before this much text, and the trainer's memory grows with it.
TOKENIZER_BYTES = 64 * 1024**2
_ENCODE_DOCUMENTS = 256
_MAKE_SHARDS = "attnres.data.corpus.make_shards --help"


@dataclass(frozen=True)
class _Plan:
    """What the first reading decides, an entry per document `[N]`."""

    sha256: list[bytes]
    bytes: NDArray[np.int64]
    group: NDArray[np.int64]
    split: NDArray[np.int8]


def prepare(config: DataConfig) -> Corpus:
    """Opens the corpus of `config`: a prepared folder, or several; else one built before from the same files, or now.

    The folder appears under its final name only when complete, and a lock lets one process build while others
    wait for it, so any number of ranks may call this at once.

    Raises:
        DataError: There is no text, too little of it, or shards are missing or damaged, or have another tokenizer.
        StorageError: The cache folder cannot be written.
    """
    corpus = _open_prepared(config) if config.source == "prepared" else _open_or_build(config)
    for split, counts in corpus.manifest["splits"].items():
        if counts["tokens"] <= config.sequence_length:
            raise DataError(
                f"data: split {split} has {counts['tokens']} tokens, fewer than one window of "
                f"{config.sequence_length} + 1; give more text or lower data.sequence_length"
            )
    return corpus


def _open_prepared(config: DataConfig) -> Corpus:
    parts = []
    for path in map(Path, config.paths):
        if not (path.expanduser() / MANIFEST).is_file():
            remedy = f"make it with: {config.obtain}" if config.obtain else "make it with python -m " + _MAKE_SHARDS
            raise DataError(f"data.paths: {path} holds no prepared token shards; {remedy}")
        parts.append(open_corpus(path.expanduser()))
    if config.tokenizer is not None:
        wanted = digest(find_tokenizer(config.tokenizer, config.obtain))["sha256"]
        for part in parts:
            if part.tokenizer_sha256 != wanted:
                raise DataError(
                    f"data.tokenizer: {config.tokenizer} is {wanted[:8]}, but {part.path} was made with "
                    f"{part.tokenizer_sha256[:8]}; leave data.tokenizer out or prepare the text again"
                )
    return parts[0] if len(parts) == 1 else mixture(parts, config.weights)


def _open_or_build(config: DataConfig) -> Corpus:
    final = Path(config.cache_dir).expanduser() / f"{config.source}-{_cache_key(config)}"
    if not final.exists():
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(final.with_name(f"{final.name}.lock")):
                if not final.exists():
                    _build_in_place_of(final, config)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM):
                raise StorageError(f"{final}: {error.strerror}; free space or set data.cache_dir") from error
            raise
    return open_corpus(final)


def _cache_key(config: DataConfig) -> str:
    """Hash of all that decides the shards, and of a listing of the source files."""
    decisive = {
        "format": FORMAT,
        "python": platform.python_version(),
        "tokenizers": tokenizers.__version__,
        "source": config.source,
        "text_column": config.text_column,
        "seed": config.seed,
        "held_out": config.held_out,
        "max_bytes": config.max_bytes,
        "files": listing(config),
        "vocab_size": config.vocab_size if config.tokenizer is None else None,
        "tokenizer": _tokenizer_identity(config),
    }
    return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:16]


def _tokenizer_identity(config: DataConfig) -> list[str] | None:
    """Digests of the files that decide an existing tokenizer and its end-of-text id."""
    if config.tokenizer is None:
        return None
    file = find_tokenizer(config.tokenizer, config.obtain)
    files = [file, file.with_name("tokenizer_config.json")]
    return [digest(path)["sha256"] for path in files if path.is_file()]


def _build_in_place_of(final: Path, config: DataConfig) -> None:
    """Builds beside `final` and renames. The caller holds the lock: an older attempt here was killed."""
    building = final.with_name(f"{final.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    try:
        _build(building, config)
        faults.point("corpus.rename")
        os.replace(building, final)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _build(folder: Path, config: DataConfig) -> None:
    logger.info("preparing data.source=%s; later runs reuse it", config.source)
    plan = _group_and_split(config)
    faults.point("corpus.read")
    if config.tokenizer is None:
        train_tokenizer(_training_texts(config, plan), config.vocab_size).save(str(folder / TOKENIZER))
        given = folder / TOKENIZER
    else:
        given = find_tokenizer(config.tokenizer, config.obtain)
        shutil.copyfile(given, folder / TOKENIZER)
    tokenizer = load_tokenizer(folder / TOKENIZER)
    vocab_size, eos_id = vocabulary_size(tokenizer), end_of_text_id(tokenizer, given)

    table, splits = _write_shards(folder, config, plan, tokenizer, vocab_size, eos_id)
    pq.write_table(table, folder / DOCUMENTS)
    files = {name: digest(folder / name) for name in (TOKENIZER, DOCUMENTS, *(f"{s}.tokens" for s in SPLITS))}
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "fingerprint": _fingerprint(table, files),
        "source": config.source,
        "seed": config.seed,
        "max_bytes": config.max_bytes,
        "documents": len(plan.group),
        "near_duplicate_groups": len(np.unique(plan.group)),
        "splits": splits,
        "vocab_size": vocab_size,
        "eos_id": eos_id,
        "dtype": token_dtype(vocab_size).str,
        "files": files,
        "versions": {"python": platform.python_version(), "tokenizers": tokenizers.__version__},
    }
    manifest["sha256_of_the_rest"] = manifest_sha256(manifest)
    file = (folder / MANIFEST).open("w", encoding="utf-8")
    json.dump(manifest, file, indent=1)
    sync_and_close(file)
    logger.info("prepared %d documents: %s", len(plan.group), splits)


def _group_and_split(config: DataConfig) -> _Plan:
    """Reads every document once and decides its group and split.

    A group's split depends on the seed and on the smallest content hash in it, so that other documents coming
    or going, or a change of order, do not move it.
    """
    sha256, sizes, signatures = [], [], []
    for document in read_documents(config):
        sha256.append(_content_sha256(document))
        sizes.append(len(document.text.encode()))
        signatures.append(minhash_signature(document.text))
    if not sha256:
        raise DataError(
            f"data.source={config.source} holds no text (paths {list(config.paths)}, max_bytes "
            f"{config.max_bytes}); give files with text, or raise data.max_bytes"
        )
    group = group_near_duplicates(np.stack(signatures))
    smallest: dict[int, bytes] = {}
    for document_group, content in zip(group.tolist(), sha256, strict=True):
        smallest[document_group] = min(content, smallest.get(document_group, content))
    split = {member: split_of(config.seed, config.held_out, key) for member, key in smallest.items()}
    plan = _Plan(sha256, np.array(sizes), group, np.array([split[g] for g in group.tolist()], np.int8))
    for index, name in enumerate(SPLITS):
        if index not in plan.split:
            raise DataError(
                f"data: none of {len(sha256)} documents ({len(smallest)} groups of near-duplicates) fell "
                f"into split {name}; give more documents, raise its fraction, or change data.seed"
            )
    return plan


def _content_sha256(document: Document) -> bytes:
    return hashlib.sha256(document.text.encode()).digest()


def _training_texts(config: DataConfig, plan: _Plan) -> Iterator[str]:
    """Text of the train split; of more than `TOKENIZER_BYTES`, an even sample of its documents."""
    in_train = plan.split == SPLITS.index("train")
    share = min(1.0, TOKENIZER_BYTES / plan.bytes[in_train].sum())
    if share < 1:
        logger.info("training the tokenizer on %.0f%% of the train split's documents", 100 * share)
    for content, wanted, document in zip(plan.sha256, in_train, _reread(config, plan), strict=True):
        # The content hash decides, so that the sample does not depend on the order of the files.
        if wanted and uniform(config.seed, b"tokenizer:" + content) < share:
            yield document.text


def _write_shards(
    folder: Path, config: DataConfig, plan: _Plan, tokenizer: Tokenizer, vocab_size: int, eos_id: int
) -> tuple[pa.Table, dict[str, dict[str, int]]]:
    """Writes the token files; returns the table of documents and the counts per split."""
    names: list[str] = []
    starts, lengths = np.empty(len(plan.split), np.int64), np.empty(len(plan.split), np.int64)
    dtype = token_dtype(vocab_size)
    writers = [ShardWriter(folder / f"{split}.tokens", dtype, eos_id) for split in SPLITS]
    try:
        documents = _reread(config, plan)
        while batch := list(islice(documents, _ENCODE_DOCUMENTS)):
            encoded = tokenizer.encode_batch_fast([d.text for d in batch], add_special_tokens=False)
            faults.point("corpus.shards")
            for document, encoding in zip(batch, encoded, strict=True):
                index = len(names)
                writer = writers[plan.split[index]]
                starts[index] = writer.tokens
                lengths[index] = writer.append(encoding.ids)
                names.append(document.name)
    finally:
        for writer in writers:
            writer.close()
    columns = {"name": names, "split": plan.split, "start": starts, "tokens": lengths, "group": plan.group}
    counts = {
        split: {"documents": int((plan.split == index).sum()), "tokens": writers[index].tokens}
        for index, split in enumerate(SPLITS)
    }
    return pa.table(columns), counts


def _reread(config: DataConfig, plan: _Plan) -> Iterator[Document]:
    """Reads the documents again, insisting that they are the same ones."""
    count = 0
    for document in read_documents(config):
        if count >= len(plan.sha256) or _content_sha256(document) != plan.sha256[count]:
            raise DataError(f"document {document.name} changed while being read; run the command again")
        yield document
        count += 1
    if count < len(plan.sha256):
        raise DataError(f"data.source={config.source} lost documents while being read; run the command again")


def _fingerprint(table: pa.Table, files: dict[str, Any]) -> str:
    """Hash of what a model can see: tokens, boundaries, splits and tokenizer, but no names or versions."""
    sha256 = hashlib.sha256()
    for name in (*(f"{split}.tokens" for split in SPLITS), TOKENIZER):
        sha256.update(bytes.fromhex(files[name]["sha256"]))
    for column, dtype in (("split", "<i8"), ("start", "<i8"), ("tokens", "<i8")):
        sha256.update(table[column].to_numpy().astype(dtype).tobytes())
    return sha256.hexdigest()

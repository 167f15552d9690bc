"""The unit in which a stream is tokenised: some documents in a row, written whole or not at all.

Which documents a chunk holds depends on the stream alone, never on how many processes work or when they were killed.

A chunk's folder:
    tokens          ids of its documents one after the other, each followed by the end-of-text id
    records         a `RECORD` per document
    names.json      their names
    meta.json       counts, digests, and the state of the stream behind the last document
"""

import hashlib
import json
import os
import shutil
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from attnres.data.corpus.corpus import content_key
from attnres.data.corpus.duplicates import SIGNATURE_ROWS, minhash_signature
from attnres.data.corpus.shards import sync_and_close
from attnres.data.text.sources import Document
from attnres.data.text.streams import Stream
from attnres.data.text.tokenizer import encode
from attnres.errors import DataError

CHUNK_DOCUMENTS = 2048
CHUNK_BYTES = 4 * 1024**2

RECORD = np.dtype(
    [
        ("tokens", "<i8"),
        ("bytes", "<i8"),
        ("content", "<u8"),
        ("sha256", "V32"),
        ("signature", "<u4", (SIGNATURE_ROWS,)),
    ]
)


@dataclass(frozen=True)
class Chunk:
    """Documents to tokenise.

    Attributes:
        number: Place in the stream, from 0.
        documents: The documents, none of them blank.
        state: Of the stream, behind the last one.
        left_out: Documents that are longer than allowed, by name, with their bytes.
        blank: Documents without text.
        cpu_seconds: Spent on reading them.
    """

    number: int
    documents: list[Document]
    state: Any
    left_out: list[tuple[str, int]]
    blank: int
    cpu_seconds: float


def read_chunks(
    stream: Stream, state: Any, number: int, max_document_bytes: int, max_bytes: float = float("inf")
) -> Iterator[Chunk]:
    """Cuts a stream into chunks.

    Args:
        stream: Where the documents come from.
        state: Of the stream, where to begin.
        number: Of the first chunk.
        max_document_bytes: Longer documents are left out, by name.
        max_bytes: Stop before the text of the documents exceeds this.
    """
    documents: list[Document] = []
    left_out: list[tuple[str, int]] = []
    size, blank, since = 0, 0, time.process_time()
    for document, behind in stream.read(state):
        length = len(document.text.encode())
        if length <= max_document_bytes and document.text.strip():
            max_bytes -= length
            if max_bytes < 0:
                break
        state = behind
        if length > max_document_bytes:
            left_out.append((document.name, length))
        elif not document.text.strip():
            blank += 1
        else:
            documents.append(document)
            size += length
        if len(documents) >= CHUNK_DOCUMENTS or size >= CHUNK_BYTES:
            yield Chunk(number, documents, state, left_out, blank, time.process_time() - since)
            documents, left_out, size, blank, since = [], [], 0, 0, time.process_time()
            number += 1
    if documents or left_out or blank:
        yield Chunk(number, documents, state, left_out, blank, time.process_time() - since)


def write_chunk(folder: Path, chunk: Chunk, tokenizer: Tokenizer, eos_id: int, dtype: np.dtype) -> dict[str, Any]:
    """Tokenises a chunk and writes it below `folder`; the rename at the end makes it count.

    Returns:
        Its `meta.json`.
    """
    began = time.process_time()
    records = np.zeros(len(chunk.documents), RECORD)
    parts: list[NDArray[np.unsignedinteger]] = []
    texts = [document.text for document in chunk.documents]
    for index, (text, ids) in enumerate(zip(texts, encode(tokenizer, texts), strict=True)):
        tokens = np.append(ids, np.uint32(eos_id)).astype(dtype)
        parts.append(tokens)
        raw = text.encode()
        records["tokens"][index] = len(tokens)
        records["bytes"][index] = len(raw)
        records["content"][index] = content_key(tokens)
        records["sha256"][index] = np.void(hashlib.sha256(raw).digest())
        records["signature"][index] = minhash_signature(text)
    tokens = np.concatenate(parts) if parts else np.empty(0, dtype)
    meta = {
        "documents": len(records),
        "tokens": len(tokens),
        "bytes": int(records["bytes"].sum()),
        "crc32": {"tokens": zlib.crc32(tokens.tobytes()), "records": zlib.crc32(records.tobytes())},
        "state": chunk.state,
        "left_out": chunk.left_out,
        "blank": chunk.blank,
    }
    temporary = folder / f".{chunk_name(chunk.number)}.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    names = json.dumps([document.name for document in chunk.documents]).encode()
    for name, data in (("tokens", tokens.tobytes()), ("records", records.tobytes()), ("names.json", names)):
        _write(temporary / name, data)
    meta["cpu_seconds"] = chunk.cpu_seconds + time.process_time() - began
    _write(temporary / "meta.json", json.dumps(meta).encode())
    os.replace(temporary, folder / chunk_name(chunk.number))
    return meta


def committed(folder: Path) -> list[dict[str, Any]]:
    """`meta.json` of the chunks from 0 on without a gap; deletes later ones and what a killed process left.

    Raises:
        DataError: One is damaged.
    """
    metas: list[dict[str, Any]] = []
    while (path := folder / chunk_name(len(metas))).is_dir():
        metas.append(read_meta(path))
    wanted = {chunk_name(number) for number in range(len(metas))}
    for path in folder.iterdir():
        if path.name not in wanted:
            shutil.rmtree(path)
    return metas


def read_meta(path: Path) -> dict[str, Any]:
    """`meta.json` of a chunk.

    Raises:
        DataError: It is damaged.
    """
    try:
        return json.loads((path / "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(path / "meta.json") from error


def read_records(path: Path) -> NDArray[np.void]:
    """Records of a chunk, checked against its digest.

    Raises:
        DataError: They are damaged.
    """
    return np.frombuffer(_checked(path, "records"), RECORD)


def read_tokens(path: Path, dtype: np.dtype) -> NDArray[np.unsignedinteger]:
    """Ids of a chunk, checked against its digest.

    Raises:
        DataError: They are damaged.
    """
    return np.frombuffer(_checked(path, "tokens"), dtype)


def chunk_name(number: int) -> str:
    """Folder name of a chunk."""
    return f"{number:08d}"


def _checked(path: Path, name: str) -> bytes:
    try:
        data = (path / name).read_bytes()
    except OSError as error:
        raise _damaged(path / name) from error
    if zlib.crc32(data) != read_meta(path)["crc32"][name]:
        raise _damaged(path / name)
    return data


def _damaged(path: Path) -> DataError:
    return DataError(f"{path} is damaged; delete {path.parents[2]} and run the same command again")


def _write(path: Path, data: bytes) -> None:
    file = path.open("wb")
    file.write(data)
    sync_and_close(file)

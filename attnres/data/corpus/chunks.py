"""The unit in which a stream is read: some documents in a row, written whole or not at all.

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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from attnres.data.corpus.duplicates import SIGNATURE_ROWS, minhash_signature
from attnres.data.corpus.shards import content_key, sync_and_close
from attnres.data.text.sources import Document
from attnres.data.text.streams import Stream
from attnres.data.text.tokenizer import encode
from attnres.errors import DataError
from attnres.files.whole_files import read_json, read_object

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
_SIGNATURE_AT = RECORD.fields["signature"][1]  # type: ignore[index]
_META = {"documents": int, "tokens": int, "bytes": int, "crc32": dict, "left_out": list, "blank": int}
_META |= {"cpu_seconds": float}


@dataclass(frozen=True)
class Chunk:
    """Documents in a row.

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


@dataclass(frozen=True)
class Encoder:
    """Turns texts into ids.

    Attributes:
        eos_id: Ends each document.
        dtype: Of an id on disk.
        whole: See `encode`.
    """

    tokenizer: Tokenizer
    eos_id: int
    dtype: np.dtype
    whole: bool

    def __call__(self, texts: Sequence[str]) -> list[NDArray[np.unsignedinteger]]:
        """Ids `[tokens]` of each text, the end-of-text id last."""
        encoded = encode(self.tokenizer, texts, self.whole)
        return [np.append(ids, np.uint32(self.eos_id)).astype(self.dtype) for ids in encoded]


def read_chunks(
    stream: Stream, state: Any, number: int, max_document_bytes: float = float("inf"), max_bytes: float = float("inf")
) -> Iterator[Chunk]:
    """Cuts a stream into chunks.

    Args:
        state: Of the stream, where to begin.
        number: Of the first chunk.
        max_document_bytes: Longer documents are left out, by name.
        max_bytes: Stop before the text of the documents exceeds this.
    """
    documents: list[Document] = []
    left_out: list[tuple[str, int]] = []
    size, blank, since = 0, 0, time.process_time()

    def chunk() -> Chunk:
        spent = time.process_time() - since
        return Chunk(number, documents, state, left_out=left_out, blank=blank, cpu_seconds=spent)

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
            yield chunk()
            documents, left_out, size, blank, since = [], [], 0, 0, time.process_time()
            number += 1
    if documents or left_out or blank:
        yield chunk()


def sign(documents: Sequence[Document]) -> NDArray[np.void]:
    """A `RECORD` for each document: all of it but what its ids decide."""
    records = np.zeros(len(documents), RECORD)
    for index, document in enumerate(documents):
        raw = document.text.encode()
        records["bytes"][index] = len(raw)
        records["sha256"][index] = np.void(hashlib.sha256(raw).digest())
        records["signature"][index] = minhash_signature(document.text)
    return records


def write_chunk(
    folder: Path, chunk: Chunk, encoder: Encoder | None, signed: NDArray[np.void] | None = None
) -> dict[str, Any]:
    """Signs and tokenises a chunk and writes it below `folder`; the rename at the end makes it count.

    Args:
        encoder: None writes no ids.
        signed: What `sign` gave for its documents, where that is known.

    Returns:
        Its `meta.json`.
    """
    began = time.process_time()
    records = sign(chunk.documents) if signed is None else signed.copy()
    ids = [] if encoder is None else encoder([document.text for document in chunk.documents])
    for index, document_ids in enumerate(ids):
        records["tokens"][index] = len(document_ids)
        records["content"][index] = content_key(document_ids)
    files = {
        "tokens": b"".join(document_ids.tobytes() for document_ids in ids),
        "records": records.tobytes(),
        "names.json": json.dumps([document.name for document in chunk.documents]).encode(),
    }
    meta = {
        "documents": len(records),
        "tokens": int(records["tokens"].sum()),
        "bytes": int(records["bytes"].sum()),
        "crc32": {name: zlib.crc32(files[name]) for name in ("tokens", "records")},
        "state": chunk.state,
        "left_out": chunk.left_out,
        "blank": chunk.blank,
        "cpu_seconds": chunk.cpu_seconds + time.process_time() - began,
    }
    temporary = folder / f".{chunk_name(chunk.number)}.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    for name, data in (files | {"meta.json": json.dumps(meta).encode()}).items():
        file = (temporary / name).open("wb")
        file.write(data)
        sync_and_close(file)
    os.replace(temporary, folder / chunk_name(chunk.number))
    return meta


@dataclass(frozen=True)
class Chunks:
    """Chunks on disk; their documents are numbered over all of them.

    Attributes:
        counts: Documents of each.
    """

    folder: Path
    counts: tuple[int, ...]

    @cached_property
    def firsts(self) -> list[int]:
        """The first document of each chunk, and the number of all documents."""
        return np.cumsum([0, *self.counts], dtype=np.int64).tolist()

    def __len__(self) -> int:
        return len(self.counts)

    def records(self, number: int) -> NDArray[np.void]:
        """Records of a chunk.

        Raises:
            DataError: They are damaged.
        """
        return np.frombuffer(self._checked(number, "records"), RECORD)

    def tokens(self, number: int, dtype: np.dtype) -> NDArray[np.unsignedinteger]:
        """Ids of a chunk.

        Raises:
            DataError: They are damaged.
        """
        return np.frombuffer(self._checked(number, "tokens"), dtype)

    def names(self, number: int) -> list[str]:
        """Names of the documents of a chunk.

        Raises:
            DataError: They are damaged.
        """
        path = self.path(number) / "names.json"
        try:
            names = read_json(path)
        except (OSError, ValueError) as error:
            raise damaged(path, self.folder.parent) from error
        if not isinstance(names, list) or len(names) != self.counts[number]:
            raise damaged(path, self.folder.parent)
        return names

    def signature(self, document: int) -> NDArray[np.uint32]:
        """`[64]`: signature of one document."""
        number = int(np.searchsorted(self.firsts, document, side="right")) - 1
        descriptor = os.open(self.path(number) / "records", os.O_RDONLY)
        try:
            offset = (document - self.firsts[number]) * RECORD.itemsize + _SIGNATURE_AT
            return np.frombuffer(os.pread(descriptor, SIGNATURE_ROWS * 4, offset), "<u4")
        finally:
            os.close(descriptor)

    def path(self, number: int) -> Path:
        """Folder of a chunk."""
        return self.folder / chunk_name(number)

    def _checked(self, number: int, name: str) -> bytes:
        path = self.path(number)
        try:
            data = (path / name).read_bytes()
        except OSError as error:
            raise damaged(path / name, self.folder.parent) from error
        if zlib.crc32(data) != read_meta(path)["crc32"].get(name):
            raise damaged(path / name, self.folder.parent)
        return data


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
    return read_own(path / "meta.json", path.parents[1], _META)


# A job lists every file that it reads, which may be millions.
_MOST_OWN_BYTES = 2**31


def read_own(path: Path, building: Path, types: dict[str, type]) -> dict[str, Any]:
    """A JSON object that an unfinished corpus keeps for itself.

    Args:
        building: Folder of the unfinished corpus.
        types: Of the values that it must hold, by key.

    Raises:
        DataError: It is damaged.
    """
    try:
        plain = read_object(path, _MOST_OWN_BYTES)
    except (OSError, ValueError) as error:
        raise damaged(path, building) from error
    if not all(isinstance(plain.get(key), kind) for key, kind in types.items()):
        raise damaged(path, building)
    return plain


def damaged(path: Path, building: Path) -> DataError:
    """A file of an unfinished corpus is not what was written to it."""
    return DataError(f"{path} is damaged; delete {building} and run the same command again")


def chunk_name(number: int) -> str:
    """Folder name of a chunk."""
    return f"{number:08d}"

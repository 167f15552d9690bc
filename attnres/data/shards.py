"""Token shards on disk: one raw file of little-endian ids per split, and the digests that show damage.

A split's file holds its documents one after the other, each followed by the end-of-text id.
"""

import hashlib
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnres.errors import DataError

# A damaged file is located to within one block.
BLOCK_BYTES = 4 * 1024**2


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest type that holds every id: two bytes below 65,536 entries, else four."""
    return np.dtype("<u2" if vocab_size < 2**16 else "<u4")


class ShardWriter:
    """Appends documents to one split's token file."""

    def __init__(self, path: Path, dtype: np.dtype, eos_id: int) -> None:
        self._file = path.open("xb")
        self._dtype = dtype
        self._eos_id = eos_id
        self.tokens = 0

    def append(self, ids: list[int]) -> int:
        """Writes a document and its end-of-text id; returns how many tokens that was."""
        self._file.write(np.array([*ids, self._eos_id], self._dtype).tobytes())
        self.tokens += len(ids) + 1
        return len(ids) + 1

    def close(self) -> None:
        """Closes the file once its bytes are on disk."""
        if not self._file.closed:
            sync_and_close(self._file)


def sync_and_close(file: Any) -> None:
    """Closes an open file once its bytes are on disk."""
    with file:
        file.flush()
        os.fsync(file.fileno())


def open_tokens(path: Path, dtype: np.dtype) -> NDArray[np.unsignedinteger]:
    """The ids of one split, `[tokens]`, read-only and mapped into memory."""
    return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.empty(0, dtype)


def digest(path: Path) -> dict[str, Any]:
    """Size, sha256 and the CRC-32 of each block of a file, as the manifest stores them."""
    sha256, crc32, size = hashlib.sha256(), [], 0
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            sha256.update(block)
            crc32.append(zlib.crc32(block))
            size += len(block)
    return {"bytes": size, "sha256": sha256.hexdigest(), "crc32_of_4MiB_blocks": crc32}


def check_file(path: Path, expected: Mapping[str, Any], contents: bool) -> None:
    """Compares a file with its digest.

    Args:
        path: File to check.
        expected: What `digest` gave when the file was written.
        contents: Read all of it; otherwise only the size is compared.

    Raises:
        DataError: It is missing or differs; the message says from which byte on.
    """
    remedy = f"delete {path.parent} and run the same command again to rebuild it"
    if not path.is_file():
        raise DataError(f"data shard {path} is missing; {remedy}")
    size = path.stat().st_size
    if size != expected["bytes"]:
        raise DataError(f"data shard {path} ends at byte {size}, expected {expected['bytes']}; {remedy}")
    if not contents:
        return
    found = digest(path)
    if found["sha256"] != expected["sha256"]:
        pairs = zip(found["crc32_of_4MiB_blocks"], expected["crc32_of_4MiB_blocks"], strict=True)
        start = next((i for i, (now, then) in enumerate(pairs) if now != then), 0) * BLOCK_BYTES
        end = min(start + BLOCK_BYTES, size)
        raise DataError(f"data shard {path} is damaged between bytes {start} and {end}; {remedy}")

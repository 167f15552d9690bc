"""Token shards on disk: raw files of little-endian ids, and the digests that show damage.

A split's documents lie one after the other, each followed by the end-of-text id, in one file or in several.
"""

import hashlib
import os
import zlib
from collections.abc import Mapping, Sequence
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


def content_key(tokens: NDArray[np.unsignedinteger]) -> int:
    """The first 8 bytes of the sha256 of a document's ids, as a number."""
    return int.from_bytes(hashlib.sha256(tokens.tobytes()).digest()[:8], "little")


def sync_and_close(file: Any) -> None:
    """Closes an open file once its bytes are on disk."""
    with file:
        file.flush()
        os.fsync(file.fileno())


class ShardedTokens:
    """Several shards as one sequence of ids, read-only and mapped into memory.

    Args:
        shards: Non-empty `[tokens]` arrays of one type.
    """

    def __init__(self, shards: Sequence[NDArray[np.unsignedinteger]]) -> None:
        self._shards = shards
        self._ends = np.cumsum([len(shard) for shard in shards])
        self.dtype = shards[0].dtype

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, key: slice | NDArray[np.int64]) -> NDArray[np.unsignedinteger]:
        """Ids at `key`: a slice of step 1, or an array of positions of any shape, which is the result's shape."""
        if isinstance(key, slice):
            return self._run(*key.indices(len(self)))
        ids = np.empty(key.shape, self.dtype)
        owner = np.searchsorted(self._ends, key, side="right")
        for index in np.unique(owner):
            shard, mine = self._shards[index], owner == index
            ids[mine] = shard[key[mine] - (self._ends[index] - len(shard))]
        return ids

    def _run(self, start: int, stop: int, step: int) -> NDArray[np.unsignedinteger]:
        if step != 1:
            raise ValueError(f"token slice: expected step 1, got {step}")
        pieces = []
        for index in range(int(np.searchsorted(self._ends, start, side="right")), len(self._shards)):
            shard = self._shards[index]
            first = int(self._ends[index]) - len(shard)
            if first >= stop:
                break
            pieces.append(shard[max(0, start - first) : stop - first])
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces) if pieces else np.empty(0, self.dtype)


def open_tokens(paths: Sequence[Path], dtype: np.dtype) -> NDArray[np.unsignedinteger] | ShardedTokens:
    """The ids of one split, `[tokens]`, read-only and mapped into memory."""
    shards = [np.memmap(path, dtype=dtype, mode="r") for path in paths if path.stat().st_size]
    if len(shards) > 1:
        return ShardedTokens(shards)
    return shards[0] if shards else np.empty(0, dtype)


class Digest:
    """Size, sha256 and the CRC-32 of each block of a stream of bytes."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()
        self._crc32 = [0]
        self._size = 0

    def update(self, data: bytes | memoryview) -> None:
        """Takes the next bytes."""
        self._sha256.update(data)
        view = memoryview(data).cast("B")
        while view:
            if self._size and self._size % BLOCK_BYTES == 0:
                self._crc32.append(0)
            piece = view[: BLOCK_BYTES - self._size % BLOCK_BYTES]
            self._crc32[-1] = zlib.crc32(piece, self._crc32[-1])
            self._size += len(piece)
            view = view[len(piece) :]

    def result(self) -> dict[str, Any]:
        """What the manifest stores."""
        blocks = self._crc32 if self._size else []
        return {"bytes": self._size, "sha256": self._sha256.hexdigest(), "crc32_of_4MiB_blocks": blocks}


def digest(path: Path) -> dict[str, Any]:
    """Size, sha256 and the CRC-32 of each block of a file, as the manifest stores them."""
    whole = Digest()
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            whole.update(block)
    return whole.result()


def check_file(path: Path, expected: Mapping[str, Any], contents: bool, remedy: str) -> None:
    """Compares a file with its digest.

    Args:
        expected: What `digest` gave when the file was written.
        contents: Read all of it; otherwise only the size is compared.

    Raises:
        DataError: It is missing or differs; the message says from which byte on.
    """
    if not path.is_file():
        raise DataError(f"data shard {path} is missing; {remedy}")
    size = path.stat().st_size
    if size != expected["bytes"]:
        raise DataError(f"data shard {path} ends at byte {size}, expected {expected['bytes']}; {remedy}")
    if not contents:
        return
    now = digest(path)
    if now["sha256"] != expected["sha256"]:
        pairs = zip(now["crc32_of_4MiB_blocks"], expected["crc32_of_4MiB_blocks"], strict=True)
        start = next((i for i, (new, old) in enumerate(pairs) if new != old), 0) * BLOCK_BYTES
        end = min(start + BLOCK_BYTES, size)
        raise DataError(f"data shard {path} is damaged between bytes {start} and {end}; {remedy}")

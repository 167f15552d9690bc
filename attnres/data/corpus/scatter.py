"""From chunks to shards: one pass, in order, that can be killed anywhere and goes on from its last synced place."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnres.data.config import SPLITS
from attnres.data.corpus.chunks import chunk_name, read_records, read_tokens
from attnres.data.corpus.shards import BLOCK_BYTES, Digest, sync_and_close

# Chunks between two synced places; they are deleted when their tokens are on disk in shards.
SYNC_CHUNKS = 32
_STATE = "scatter.json"


class RollingShards:
    """The shards of one split: `<split>-00000.tokens` and so on, all but the last of `shard_tokens` tokens.

    Args:
        folder: Where they are.
        split: Name of the split.
        dtype: Of an id.
        shard_tokens: Most tokens of a shard.
        state: What `sync` returned last; the file is cut back to it.
    """

    def __init__(
        self, folder: Path, split: str, dtype: np.dtype, shard_tokens: int, state: dict[str, Any] | None
    ) -> None:
        self._folder, self._split, self._dtype, self._shard_tokens = folder, split, dtype, shard_tokens
        self.finished: dict[str, dict[str, Any]] = dict(state["finished"]) if state else {}
        self._open(state["tokens"] if state else 0)

    def append(self, ids: NDArray[np.unsignedinteger]) -> None:
        """Writes ids, beginning another shard where one is full."""
        while len(ids):
            if self._tokens == self._shard_tokens:
                self._finish()
                self._open(0)
            part = ids[: self._shard_tokens - self._tokens].tobytes()
            self._file.write(part)
            self._digest.update(part)
            self._tokens += len(part) // self._dtype.itemsize
            ids = ids[len(part) // self._dtype.itemsize :]

    def sync(self) -> dict[str, Any]:
        """Brings everything to the disk; returns the place to go on from."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return {"finished": self.finished, "tokens": self._tokens}

    def close(self) -> dict[str, dict[str, Any]]:
        """Finishes the last shard; returns the digest of each by name."""
        self._finish()
        return self.finished

    @property
    def tokens(self) -> int:
        """Ids written so far, in all shards."""
        return sum(entry["bytes"] for entry in self.finished.values()) // self._dtype.itemsize + self._tokens

    def _open(self, tokens: int) -> None:
        self._path = self._folder / f"{self._split}-{len(self.finished):05d}.tokens"
        self._digest, self._tokens = Digest(), tokens
        self._file = self._path.open("r+b" if tokens else "wb")
        if tokens:
            self._file.truncate(tokens * self._dtype.itemsize)
            while block := self._file.read(BLOCK_BYTES):
                self._digest.update(block)

    def _finish(self) -> None:
        sync_and_close(self._file)
        self.finished[self._path.name] = self._digest.result()
        self._tokens = 0


def scatter(
    folder: Path,
    chunks: Path,
    counts: list[int],
    splits: NDArray[np.int8],
    dtype: np.dtype,
    shard_tokens: int,
    progress: Callable[[int], None],
) -> dict[str, dict[str, dict[str, Any]]]:
    """Writes the shards of every split and deletes the chunks.

    Args:
        folder: Where the shards go.
        chunks: Folder of the chunks.
        counts: Documents of each chunk.
        splits: `[N]`: index into `SPLITS` of each document, -1 for one that is left out.
        dtype: Of an id.
        shard_tokens: Most tokens of a shard.
        progress: Told the number of chunks done.

    Returns:
        For each split its shards' digests by name.
    """
    firsts = np.cumsum([0, *counts])
    state: dict[str, Any] = {"chunk": 0}
    if (folder / _STATE).is_file():
        state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
    shards = [RollingShards(folder, split, dtype, shard_tokens, state.get(split)) for split in SPLITS]
    done = deleted = state["chunk"]
    for number in range(done, len(counts)):
        path = chunks / chunk_name(number)
        tokens, lengths = read_tokens(path, dtype), read_records(path)["tokens"]
        owner = np.repeat(splits[firsts[number] : firsts[number + 1]], lengths)
        for index, split in enumerate(shards):
            split.append(tokens[owner == index])
        done = number + 1
        if done % SYNC_CHUNKS == 0 or done == len(counts):
            places = {split: writer.sync() for split, writer in zip(SPLITS, shards, strict=True)}
            write_atomically(folder / _STATE, json.dumps({"chunk": done} | places))
            for old in range(deleted, done):
                shutil.rmtree(chunks / chunk_name(old), ignore_errors=True)
            deleted = done
            progress(done)
    return {split: writer.close() for split, writer in zip(SPLITS, shards, strict=True)}


def write_atomically(path: Path, text: str) -> None:
    """Writes a small file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    file = temporary.open("w", encoding="utf-8")
    file.write(text)
    sync_and_close(file)
    os.replace(temporary, path)

"""From chunks to shards: one pass, in order, that can be killed anywhere and goes on from its last synced place."""

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnres.data.config import SPLITS
from attnres.data.corpus.chunks import Chunks, damaged, read_own
from attnres.data.corpus.shards import BLOCK_BYTES, Digest, sync_and_close
from attnres.files.whole_files import write_text

logger = logging.getLogger(__name__)

# Chunks between two synced places; they are deleted when their tokens are on disk in shards.
SYNC_CHUNKS = 32
STATE = "scatter.json"


class RollingShards:
    """The shards of one split: `<split>-00000.tokens` and so on, all but the last of `shard_tokens` tokens.

    Args:
        folder: Where they are.
        split: Name of the split.
        dtype: Of an id.
        shard_tokens: Most tokens of a shard; None puts all of them into `<split>.tokens`.
        state: What `sync` returned last; the file is cut back to it.
    """

    def __init__(
        self, folder: Path, split: str, dtype: np.dtype, shard_tokens: int | None, state: dict[str, Any] | None
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
            room = len(ids) if self._shard_tokens is None else self._shard_tokens - self._tokens
            data = ids[:room].tobytes()
            self._file.write(data)
            self._digest.update(data)
            self._tokens += len(data) // self._dtype.itemsize
            ids = ids[room:]

    def sync(self) -> dict[str, Any]:
        """Brings everything to the disk; returns the place to go on from."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return {"finished": self.finished, "tokens": self._tokens}

    def close(self) -> dict[str, dict[str, Any]]:
        """Finishes the last shard; returns the digest of each by name."""
        self._finish()
        return self.finished

    def _open(self, tokens: int) -> None:
        name = f"{self._split}-{len(self.finished):05d}" if self._shard_tokens else self._split
        self._path = self._folder / f"{name}.tokens"
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
    folder: Path, chunks: Chunks, splits: NDArray[np.int8], dtype: np.dtype, shard_tokens: int | None
) -> dict[str, dict[str, dict[str, Any]]]:
    """Writes the shards of every split and deletes the chunks.

    Args:
        folder: Where the shards go.
        chunks: The ids.
        splits: `[N]`: index into `SPLITS` of each document, -1 for one that is left out.
        dtype: Of an id.
        shard_tokens: See `RollingShards`.

    Returns:
        For each split its shards' digests by name.

    Raises:
        DataError: A chunk or the synced place is damaged.
    """
    state = _read_state(folder, len(chunks))
    try:
        shards = [RollingShards(folder, split, dtype, shard_tokens, state.get(split)) for split in SPLITS]
    except FileNotFoundError as error:
        raise damaged(folder / STATE, folder) from error
    deleted = state["chunk"]
    for number in range(deleted, len(chunks)):
        tokens, lengths = chunks.tokens(number, dtype), chunks.records(number)["tokens"]
        owner = np.repeat(splits[slice(*chunks.firsts[number : number + 2])], lengths)
        for index, split in enumerate(shards):
            split.append(tokens[owner == index])
        done = number + 1
        if done % SYNC_CHUNKS == 0 or done == len(chunks):
            places = {split: writer.sync() for split, writer in zip(SPLITS, shards, strict=True)}
            write_text(folder / STATE, json.dumps({"chunk": done} | places))
            for old in range(deleted, done):
                shutil.rmtree(chunks.path(old), ignore_errors=True)
            deleted = done
            if shard_tokens is not None:
                logger.info("shards: %d of %d chunks", done, len(chunks))
    return {split: writer.close() for split, writer in zip(SPLITS, shards, strict=True)}


def _read_state(folder: Path, chunks: int) -> dict[str, Any]:
    """Where to go on: the next chunk, and what `RollingShards.sync` gave for each split."""
    path = folder / STATE
    if not path.is_file():
        return {"chunk": 0}
    state = read_own(path, folder, {"chunk": int} | dict.fromkeys(SPLITS, dict))
    for split in SPLITS:
        place = state[split]
        if not (isinstance(place.get("finished"), dict) and isinstance(place.get("tokens"), int)):
            raise damaged(path, folder)
    if not 0 <= state["chunk"] <= chunks:
        raise damaged(path, folder)
    return state

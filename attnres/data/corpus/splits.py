"""Which split a document belongs to: a pure function of the seed and of its group of near-duplicates."""

import hashlib
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from attnres.data.config import SPLITS
from attnres.data.corpus.chunks import Chunks
from attnres.errors import DataError

# Pair counts settle long before this much text, and the trainer's memory grows with it.
TOKENIZER_BYTES = 64 * 1024**2


def split_of(seed: int, held_out: tuple[float, ...], key: bytes) -> int:
    """Index into `SPLITS` of the group whose smallest content hash is `key`.

    Other documents coming or going, or a change of order, do not move it.
    """
    # The held-out splits take the low end of [0, 1) and train the rest. Past the last edge, the remainder wraps round
    # to 0, which is train.
    edges = np.cumsum(held_out)
    return (int(np.searchsorted(edges, _uniform(seed, key), side="right")) + 1) % len(SPLITS)


def decide_splits(
    chunks: Chunks, groups: NDArray[np.integer], excluded: NDArray[np.uint64], decide: Callable[[bytes], int]
) -> NDArray[np.int8]:
    """The split of each document: that of its group.

    In memory: 1 byte a document, and 100 bytes for each group of more than one.

    Args:
        groups: `[N]`, the lowest document of each document's group.
        excluded: Sorted content keys of documents to leave out.

    Returns:
        `[N]`: index into `SPLITS` of each document, -1 for one that is left out.
    """
    alone = np.bincount(groups, minlength=len(groups)) == 1 if len(groups) else np.empty(0, bool)
    splits = np.full(len(groups), -1, np.int8)
    smallest: dict[int, bytes] = {}
    for number, first in enumerate(chunks.firsts[:-1]):
        records = chunks.records(number)
        for index in np.flatnonzero(~alone[groups[first : first + len(records)]]).tolist():
            group, key = int(groups[first + index]), records["sha256"][index].tobytes()
            smallest[group] = min(key, smallest.get(group, key))
    decided = {group: decide(key) for group, key in smallest.items()}
    del smallest
    for number, first in enumerate(chunks.firsts[:-1]):
        records = chunks.records(number)
        for index in np.flatnonzero(~np.isin(records["content"], excluded)).tolist():
            known = decided.get(int(groups[first + index]))
            splits[first + index] = decide(records["sha256"][index].tobytes()) if known is None else known
    return splits


def check_splits(splits: NDArray[np.int8], groups: int, option: Callable[[str], str]) -> None:
    """Every split has a document.

    Args:
        groups: Number of groups, for the message.

    Raises:
        DataError: One has none.
    """
    for index, name in enumerate(SPLITS):
        if not (splits == index).any():
            raise DataError(
                f"data: none of {int((splits >= 0).sum())} documents ({groups} groups of near-duplicates) fell into "
                f"split {name}; give more documents, raise {option(name)}, or change {option('seed')}"
            )


def sample_texts(
    texts: Iterable[tuple[str, bytes]], seed: int, share: float, most: float = float("inf")
) -> Iterator[str]:
    """An even sample of texts for a tokenizer; it does not depend on their order until it ends at `most`.

    Args:
        texts: Each with its sha256, which decides whether it is taken.
        share: Expected fraction of the texts to take.
        most: Bytes to stop before.
    """
    size = 0
    for text, key in texts:
        if _uniform(seed, b"tokenizer:" + key) < share:
            size += len(text.encode())
            if size > most:
                return
            yield text


def _uniform(seed: int, key: bytes) -> float:
    """A number in [0, 1) that is a pure function of its arguments."""
    return int.from_bytes(hashlib.sha256(b"%d:" % seed + key).digest()[:6], "big") / 2**48

"""Which split a document belongs to: a pure function of the seed and of its group of near-duplicates."""

import hashlib

import numpy as np

from attnres.data.config import SPLITS


def split_of(seed: int, held_out: tuple[float, ...], key: bytes) -> int:
    """Index into `SPLITS` of the group whose smallest content hash is `key`.

    Other documents coming or going, or a change of order, do not move it.

    Args:
        seed: Decides which documents are held out.
        held_out: Fractions of the splits that are not trained on, in the order of `SPLITS[1:]`.
        key: Smallest sha256 of a text in the group.
    """
    # The held-out splits take the low end of [0, 1) and train the rest. Past the last edge, the remainder wraps round
    # to 0, which is train.
    edges = np.cumsum(held_out)
    return (int(np.searchsorted(edges, uniform(seed, key), side="right")) + 1) % len(SPLITS)


def uniform(seed: int, key: bytes) -> float:
    """A number in [0, 1) that is a pure function of its arguments."""
    return int.from_bytes(hashlib.sha256(b"%d:" % seed + key).digest()[:6], "big") / 2**48

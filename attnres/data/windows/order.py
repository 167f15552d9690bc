"""Permutations that are pure functions of integers."""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


@lru_cache(maxsize=16)
def permutation(count: int, *key: int) -> NDArray[np.int64]:
    """A permutation of `range(count)`, read-only, that depends on `key` alone; 8 bytes per entry stay in memory."""
    # Sorting raw bits: unlike Generator.permutation, their stream is promised to be the same in every numpy.
    bits = np.random.PCG64(np.random.SeedSequence(list(key))).random_raw(count)
    order = np.argsort(bits, kind="stable")
    order.flags.writeable = False  # it is shared by all callers
    return order

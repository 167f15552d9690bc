"""Signatures that near-duplicate documents share, so that a split can keep such documents together.

A vendored copy or a slightly edited file that sits in two splits would let a model be tested on what it was
trained on. Each document becomes a MinHash signature (Broder 1997) of its 32-byte windows; documents whose
signatures share a band of rows are compared, and those that agree on enough rows are joined, transitively
(`attnres.data.corpus.grouping`).

The hashing is numpy over whole documents, because per-shingle Python is several times slower than reading and
tokenising the text. One signature takes 256 bytes.
"""

import numpy as np
from numpy.typing import NDArray

SIGNATURE_ROWS = 64
BANDS = 16
# Documents are joined from an estimated Jaccard similarity of 0.70 on; bands of 4 rows find 98.8% of the
# pairs at 0.70, and more above.
MIN_EQUAL_ROWS = 45
# Keeps the repeated passes over a long document in the processor's cache.
_CHUNK = 16384

# Raw bits rather than a Generator's methods, whose results may change between numpy releases.
_bits = np.random.PCG64(20030913)
_BYTE_HASHES = _bits.random_raw(256).astype(np.uint32)
_MULTIPLIERS = _bits.random_raw(SIGNATURE_ROWS).astype(np.uint32) | np.uint32(1)


def minhash_signature(text: str) -> NDArray[np.uint32]:
    """MinHash signature `[64]` of a text; runs of white space count as one space."""
    hashes = _window_hashes(b" ".join(text.encode().split()))
    signature = np.full(SIGNATURE_ROWS, np.iinfo(np.uint32).max, np.uint32)
    for start in range(0, len(hashes), _CHUNK):
        chunk = hashes[start : start + _CHUNK]
        product = np.empty_like(chunk)
        for row, multiplier in enumerate(_MULTIPLIERS):
            np.multiply(chunk, multiplier, out=product)
            signature[row] = min(signature[row], product.min())
    return signature


def _window_hashes(data: bytes) -> NDArray[np.uint32]:
    """A mixed 32-bit hash of each 32-byte window; a shorter text is one window, padded with zeros."""
    hashes = _BYTE_HASHES[np.frombuffer(data.ljust(32, b"\0"), np.uint8)]
    # A polynomial hash by doubling: windows of 1, 2, 4, 8, 16 and then 32 bytes. Arithmetic is modulo 2^32.
    multiplier = 0x9E3779B1
    for width in (1, 2, 4, 8, 16):
        hashes = hashes[:-width] * np.uint32(multiplier) + hashes[width:]
        multiplier = multiplier * multiplier % 2**32
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        hashes ^= hashes >> np.uint32(shift)
        hashes *= np.uint32(factor)
    hashes ^= hashes >> np.uint32(16)
    return hashes

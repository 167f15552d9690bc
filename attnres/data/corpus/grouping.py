"""Groups of near-duplicates among more documents than memory could hold the signatures of.

Documents whose MinHash signatures share a band are compared, and joined if they nearly agree. Signatures stay on disk,
in the records of the chunks. Per band, the documents are sorted by the band's hash in portions of at most `PORTION`,
and only where two meet are their signatures read.

In memory: 4 bytes a document for its group, and a portion of 24 bytes an entry.
"""

from collections import defaultdict
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from attnres.data.corpus.chunks import Chunks
from attnres.data.corpus.duplicates import BANDS, MIN_EQUAL_ROWS, SIGNATURE_ROWS

# Entries (a document and one of its bands) that are sorted at once.
PORTION = 4 * 1024**2
# Of documents that share a band and are all different, so many are compared with the next one.
MOST_COMPARED = 512
_ROWS_PER_BAND = SIGNATURE_ROWS // BANDS


class Groups:
    """Disjoint groups of documents `0 .. count-1`, each named by its lowest document."""

    def __init__(self, count: int) -> None:
        self._parent: NDArray[np.integer] = np.arange(count, dtype=np.int32 if count < 2**31 else np.int64)

    def root(self, document: int) -> int:
        """The lowest document of a document's group."""
        parent = self._parent
        while (above := int(parent[document])) != document:
            parent[document] = parent[above]
            document = above
        return document

    def join(self, first: int, second: int) -> None:
        """Makes the groups of two documents one."""
        low, high = sorted((self.root(first), self.root(second)))
        self._parent[high] = low

    def all(self) -> NDArray[np.integer]:
        """`[count]`: the lowest document of each document's group."""
        parent = self._parent
        while not np.array_equal(above := parent[parent], parent):
            parent = above
        return parent


def group_near_duplicates(chunks: Chunks, bounded: bool) -> NDArray[np.integer]:
    """`[N]`: for each document the lowest document of its group of near-duplicates.

    Args:
        bounded: Take the documents of a band by its hash, and compare each with at most `MOST_COMPARED`. Otherwise take
            them in their order, whatever memory that takes. The groups are the same but for rare chains of documents
            that each nearly agree with the next one.
    """
    count = chunks.firsts[-1]
    groups = Groups(count)
    portion = PORTION if bounded else max(1, count)
    at_once = max(1, min(BANDS, portion // max(1, count)))
    shares = -(-count // portion) if count else 0
    for first in range(0, BANDS, at_once):
        last = min(BANDS, first + at_once)
        # Documents that share a band fall into one share, by a hash of that band.
        for share in range(shares):
            keys: list[list[NDArray[np.uint64]]] = [[] for _ in range(first, last)]
            ids: list[list[NDArray[np.int64]]] = [[] for _ in range(first, last)]
            for start, hashes in _bands(chunks, first, last):
                for band, row in enumerate(hashes):
                    mine = np.flatnonzero(row % np.uint64(shares) == share)
                    keys[band].append(row[mine])
                    ids[band].append(mine + start)
            for band in range(last - first):
                _join_band(groups, chunks, np.concatenate(keys[band]), np.concatenate(ids[band]), bounded)
                keys[band], ids[band] = [], []
    return groups.all()


def _bands(chunks: Chunks, first: int, last: int) -> Iterator[tuple[int, NDArray[np.uint64]]]:
    """The first document of each chunk, and the hashes `[last - first, documents]` of some bands."""
    for number, start in enumerate(chunks.firsts[:-1]):
        rows = chunks.records(number)["signature"]
        bands = rows.reshape(len(rows), BANDS, _ROWS_PER_BAND)[:, first:last].astype(np.uint64)
        hashes = np.zeros((last - first, len(rows)), np.uint64)
        for row in range(_ROWS_PER_BAND):
            hashes = _scramble(hashes ^ bands[:, :, row].T)
        yield start, hashes


def _join_band(groups: Groups, chunks: Chunks, keys: NDArray[np.uint64], ids: NDArray[np.int64], bounded: bool) -> None:
    """Joins documents that share a key and nearly agree."""
    order = np.argsort(keys, kind="stable")
    keys, ids = keys[order], ids[order]
    edges = np.flatnonzero(np.diff(keys)) + 1
    runs = np.repeat(np.arange(len(edges) + 1), np.diff([0, *edges, len(keys)]))
    shared = np.flatnonzero(np.bincount(runs, minlength=1)[runs] > 1)
    runs, ids = runs[shared], ids[shared]
    if not bounded:
        order = np.argsort(ids, kind="stable")
        runs, ids = runs[order], ids[order]
    # The documents of each run that the next one is compared with.
    met: defaultdict[int, dict[int, NDArray[np.uint32]]] = defaultdict(dict)
    for run, document in zip(runs.tolist(), ids.tolist(), strict=True):
        if bounded and run not in met:
            met.clear()
        _meet(groups, chunks, document, met[run], MOST_COMPARED if bounded else None)


def _meet(groups: Groups, chunks: Chunks, document: int, met: dict[int, NDArray[np.uint32]], most: int | None) -> None:
    """Joins a document with the first of `met` that it nearly agrees with, or adds it to them."""
    signature = None
    for other, known in met.items():
        if groups.root(document) == groups.root(other):
            return
        signature = chunks.signature(document) if signature is None else signature
        if (signature == known).sum() >= MIN_EQUAL_ROWS:
            groups.join(document, other)
            return
    if most is None or len(met) < most:
        met[document] = chunks.signature(document) if signature is None else signature


def _scramble(hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finisher of splitmix64: close inputs give unrelated outputs."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        hashes = (hashes ^ (hashes >> np.uint64(shift))) * np.uint64(factor)
    return hashes ^ (hashes >> np.uint64(31))

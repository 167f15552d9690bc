"""Near-duplicates and splits of more documents than memory could hold the signatures of.

The rule is that of `attnres.data.corpus.duplicates`: documents whose MinHash signatures share a band are compared, and
joined if they nearly agree. Here signatures stay on disk, in the records of the chunks. Per band, the documents are
sorted by the band's hash in portions of at most `PORTION`, and only where two meet are their signatures read.

In memory: 4 bytes a document for its group and 1 for its split, a portion of 24 bytes an entry, and 100 bytes for each
group of more than one document.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from attnres.data.config import SPLITS
from attnres.data.corpus.chunks import RECORD, chunk_name, read_records
from attnres.data.corpus.duplicates import BANDS, MIN_EQUAL_ROWS, SIGNATURE_ROWS
from attnres.data.corpus.splits import split_of
from attnres.errors import DataError

# Entries (a document and one of its bands) that are sorted at once.
PORTION = 4 * 1024**2
# Of documents that share a band and are all different, so many are compared with the next one.
MOST_COMPARED = 512

DOCUMENTS_SCHEMA = pa.schema(
    {
        "name": pa.string(),
        "split": pa.int8(),
        "start": pa.int64(),
        "tokens": pa.int64(),
        "group": pa.int64(),
        "content": pa.uint64(),
    }
)
_SIGNATURE_AT = RECORD.fields["signature"][1]  # type: ignore[index]
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


class Signatures:
    """Signatures on disk: chunk after chunk, one at a time or one band of all.

    Args:
        folder: Folder of the chunks.
        counts: Documents of each chunk.
    """

    def __init__(self, folder: Path, counts: list[int]) -> None:
        self._folder = folder
        self._firsts = np.cumsum([0, *counts])

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def one(self, document: int) -> NDArray[np.uint32]:
        """`[64]`: signature of one document."""
        chunk = int(np.searchsorted(self._firsts, document, side="right")) - 1
        descriptor = os.open(self._folder / chunk_name(chunk) / "records", os.O_RDONLY)
        try:
            offset = (document - int(self._firsts[chunk])) * RECORD.itemsize + _SIGNATURE_AT
            return np.frombuffer(os.pread(descriptor, SIGNATURE_ROWS * 4, offset), "<u4")
        finally:
            os.close(descriptor)

    def bands(self, first: int, last: int) -> Iterator[tuple[int, NDArray[np.uint64]]]:
        """The first document of each chunk, and the hashes `[last - first, documents]` of some bands."""
        for chunk, start in enumerate(self._firsts[:-1].tolist()):
            rows = read_records(self._folder / chunk_name(chunk))["signature"]
            bands = rows.reshape(len(rows), BANDS, _ROWS_PER_BAND)[:, first:last].astype(np.uint64)
            hashes = np.zeros((last - first, len(rows)), np.uint64)
            for row in range(_ROWS_PER_BAND):
                hashes = _scramble(hashes ^ bands[:, :, row].T)
            yield start, hashes


def group_on_disk(signatures: Signatures, portion: int = PORTION) -> NDArray[np.integer]:
    """`[N]`: for each document the lowest document of its group of near-duplicates.

    Args:
        signatures: Of all documents.
        portion: Most entries that are sorted at once.
    """
    count = len(signatures)
    groups = Groups(count)
    at_once = max(1, min(BANDS, portion // max(1, count)))
    shares = -(-count // portion) if count else 0
    for first in range(0, BANDS, at_once):
        last = min(BANDS, first + at_once)
        # Documents that share a band fall into one share, by a hash of that band.
        for share in range(shares):
            keys: list[list[NDArray[np.uint64]]] = [[] for _ in range(first, last)]
            ids: list[list[NDArray[np.int64]]] = [[] for _ in range(first, last)]
            for start, hashes in signatures.bands(first, last):
                for band, row in enumerate(hashes):
                    mine = np.flatnonzero(row % np.uint64(shares) == share)
                    keys[band].append(row[mine])
                    ids[band].append(mine + start)
            for band in range(last - first):
                _join_band(groups, signatures, np.concatenate(keys[band]), np.concatenate(ids[band]))
                keys[band], ids[band] = [], []
    return groups.all()


def _join_band(groups: Groups, signatures: Signatures, keys: NDArray[np.uint64], ids: NDArray[np.int64]) -> None:
    order = np.argsort(keys, kind="stable")
    keys, ids = keys[order], ids[order]
    edges = np.flatnonzero(np.diff(keys)) + 1
    starts, ends = np.append(0, edges), np.append(edges, len(keys))
    for run in np.flatnonzero(ends - starts > 1):
        met: dict[int, NDArray[np.uint32]] = {}
        for document in ids[starts[run] : ends[run]].tolist():
            signature = None
            for other, known in met.items():
                if groups.root(document) == groups.root(other):
                    break
                signature = signatures.one(document) if signature is None else signature
                if (signature == known).sum() >= MIN_EQUAL_ROWS:
                    groups.join(document, other)
                    break
            else:
                if len(met) < MOST_COMPARED:
                    met[document] = signatures.one(document) if signature is None else signature


def write_documents(
    path: Path, chunks: Path, counts: list[int], groups: NDArray[np.integer], seed: int, held_out: tuple[float, ...],
    excluded: NDArray[np.uint64],
) -> NDArray[np.int8]:  # fmt: skip
    """Writes the table of documents, chunk by chunk.

    Args:
        path: File to write, whole or not at all.
        chunks: Folder of the chunks.
        counts: Documents of each chunk.
        groups: `[N]`, the lowest document of each document's group.
        seed: Decides the split of each group.
        held_out: Fractions of the splits that are not trained on.
        excluded: Sorted content keys of documents to leave out.

    Returns:
        `[N]`: index into `SPLITS` of each document, -1 for one that is left out.

    Raises:
        DataError: A split would be empty.
    """
    firsts = np.cumsum([0, *counts])
    alone = np.bincount(groups, minlength=len(groups)) == 1 if len(groups) else np.empty(0, bool)
    splits = np.full(len(groups), -1, np.int8)
    smallest: dict[int, bytes] = {}
    for chunk, first in enumerate(firsts[:-1].tolist()):
        records = read_records(chunks / chunk_name(chunk))
        for index in np.flatnonzero(~alone[groups[first : first + len(records)]]).tolist():
            group, key = int(groups[first + index]), records["sha256"][index].tobytes()
            smallest[group] = min(key, smallest.get(group, key))
    decided = {group: split_of(seed, held_out, key) for group, key in smallest.items()}
    del smallest
    for chunk, first in enumerate(firsts[:-1].tolist()):
        records = read_records(chunks / chunk_name(chunk))
        for index in np.flatnonzero(~np.isin(records["content"], excluded)).tolist():
            group = int(groups[first + index])
            known = decided.get(group)
            splits[first + index] = (
                split_of(seed, held_out, records["sha256"][index].tobytes()) if known is None else known
            )
    kept = splits >= 0
    for index, name in enumerate(SPLITS):
        if not (splits == index).any():
            raise DataError(
                f"none of {int(kept.sum())} documents fell into split {name}; give more text, raise "
                f"--{name.replace('_', '-')}, or change --seed"
            )
    _write_table(path, chunks, firsts, groups, splits)
    return splits


def _write_table(
    path: Path, chunks: Path, firsts: NDArray[np.int64], groups: NDArray[np.integer], splits: NDArray[np.int8]
) -> None:
    kept = splits >= 0
    names_of_groups = None
    if not kept.all():
        # Ids count the documents that are kept; a group is named by the lowest of its kept ones.
        new_ids = np.cumsum(kept) - 1
        names_of_groups = np.full(len(groups), -1, np.int64)
        ids = np.flatnonzero(kept)[::-1]
        names_of_groups[groups[ids]] = new_ids[ids]
    ends = [0] * len(SPLITS)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with pq.ParquetWriter(temporary, DOCUMENTS_SCHEMA) as writer:
        for chunk, (first, last) in enumerate(zip(firsts[:-1].tolist(), firsts[1:].tolist(), strict=True)):
            folder = chunks / chunk_name(chunk)
            records, split, mine = read_records(folder), splits[first:last], kept[first:last]
            starts = np.zeros(len(records), np.int64)
            for index in range(len(SPLITS)):
                lengths = records["tokens"][split == index]
                starts[split == index] = ends[index] + np.cumsum(lengths) - lengths
                ends[index] += int(lengths.sum())
            group = groups[first:last].astype(np.int64)
            names = np.array(json.loads((folder / "names.json").read_text(encoding="utf-8")), object)
            columns = {
                "name": names[mine],
                "split": split[mine],
                "start": starts[mine],
                "tokens": records["tokens"][mine],
                "group": (group if names_of_groups is None else names_of_groups[group])[mine],
                "content": records["content"][mine],
            }
            writer.write_table(pa.table(columns, schema=DOCUMENTS_SCHEMA))
    os.replace(temporary, path)


def _scramble(hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finisher of splitmix64: close inputs give unrelated outputs."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        hashes = (hashes ^ (hashes >> np.uint64(shift))) * np.uint64(factor)
    return hashes ^ (hashes >> np.uint64(31))

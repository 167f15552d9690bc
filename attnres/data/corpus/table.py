"""`documents.parquet`: a row per document, from the chunks' records."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from attnres.data.config import SPLITS
from attnres.data.corpus.chunks import Chunks
from attnres.files.whole_files import whole_file

_SCHEMA = pa.schema(
    {
        "name": pa.string(),
        "split": pa.int8(),
        "start": pa.int64(),
        "tokens": pa.int64(),
        "group": pa.int64(),
        "content": pa.uint64(),
    }
)


def write_table(
    path: Path, chunks: Chunks, groups: NDArray[np.integer], splits: NDArray[np.int8], sharded: bool
) -> None:
    """Writes the table, whole or not at all.

    Args:
        groups: `[N]`, the lowest document of each document's group.
        splits: `[N]`, index into `SPLITS` of each document, -1 for one that is left out.
        sharded: A row group per chunk, with the column `content`; otherwise one row group without it.
    """
    schema = _SCHEMA if sharded else _SCHEMA.remove(_SCHEMA.get_field_index("content"))
    tables = (
        pa.table({name: columns[name] for name in schema.names}, schema=schema)
        for columns in _columns(chunks, groups, splits)
    )
    with whole_file(path) as temporary:
        if sharded:
            with pq.ParquetWriter(temporary, schema) as writer:
                for table in tables:
                    writer.write_table(table)
        else:
            pq.write_table(pa.concat_tables(tables).combine_chunks(), temporary)


def _columns(
    chunks: Chunks, groups: NDArray[np.integer], splits: NDArray[np.int8]
) -> Iterator[dict[str, NDArray[Any]]]:
    """The columns of each chunk's rows."""
    kept = splits >= 0
    names_of_groups = None
    if not kept.all():
        # Ids count the documents that are kept; a group is named by the lowest of its kept ones.
        new_ids = np.cumsum(kept) - 1
        names_of_groups = np.full(len(groups), -1, np.int64)
        ids = np.flatnonzero(kept)[::-1]
        names_of_groups[groups[ids]] = new_ids[ids]
    ends = [0] * len(SPLITS)
    for number in range(len(chunks)):
        here = slice(*chunks.firsts[number : number + 2])
        records, split, mine = chunks.records(number), splits[here], kept[here]
        starts = np.zeros(len(records), np.int64)
        for index in range(len(SPLITS)):
            lengths = records["tokens"][split == index]
            starts[split == index] = ends[index] + np.cumsum(lengths) - lengths
            ends[index] += int(lengths.sum())
        group = groups[here].astype(np.int64)
        columns = {
            "name": np.array(chunks.names(number), object),
            "split": split,
            "start": starts,
            "tokens": records["tokens"],
            "group": group if names_of_groups is None else names_of_groups[group],
            "content": records["content"],
        }
        yield {name: column[mine] for name, column in columns.items()}


def count_groups(path: Path) -> int:
    """Groups of near-duplicates in a table; the lowest document of a group names it."""
    count = first = 0
    with pq.ParquetFile(path) as table:
        for batch in table.iter_batches(columns=["group"]):
            group = batch.column(0).to_numpy()
            count += int((group == np.arange(first, first + len(group))).sum())
            first += len(group)
    return count

"""What others make of the tables: pandas and pyarrow at their defaults read what stands there."""

import pandas as pd
import pyarrow.csv
import pytest

from attnres.tables import columns
from attnres.tables.folder import read_table, stays_text, write_table
from attnres.tables.names import Verdict
from tests.statistics.probed_tables import measured, write_folder
from tests.tables.fake_folder import cells_table, write_fake

TABLES = [*columns.MEASURED, *columns.JUDGED]
READERS = {
    "pandas": lambda path: pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path),
    "pyarrow": lambda path: (
        pyarrow.parquet.read_table(path) if path.suffix == ".parquet" else pyarrow.csv.read_csv(path)
    ).to_pandas(),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    where = tmp_path_factory.mktemp("readers")
    effects = {("attnres", ("embedding", "mlp", "early")): 0.3}
    return [write_folder(where / "judged", *measured(effects)), write_fake(where / "fake")]


def unlike(read: pd.DataFrame, ours: pd.DataFrame, described: dict[str, columns.Column]) -> list[str]:
    """Columns that a reader takes for something else than we wrote."""
    wrong = [name for name in ours if name not in read]
    for name in set(ours) - set(wrong):
        kind, theirs, own = described[name].type, read[name], ours[name]
        if kind == "text":
            # An empty text is a missing value to every reader, and stands only where nothing is to be said.
            same = theirs.where(theirs.notna(), "").tolist() == own.tolist()
        elif kind == "flag":
            same = theirs.dtype == bool and theirs.tolist() == own.tolist()
        else:
            same = theirs.isna().tolist() == own.isna().tolist() and (theirs.isna().all() or theirs.dtype.kind in "iuf")
        wrong += [] if same else [name]
    return wrong


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_every_table_is_read_at_the_defaults_as_it_was_written(folders, table, reader):
    there = [folder for folder in folders if (folder / table.name).is_file()]
    assert there or table in (columns.ATTRIBUTION, columns.RESCUES), "no folder here holds this table"
    for folder in there:
        described = {column.name: column for column in table.columns}
        assert unlike(READERS[reader](folder / table.name), read_table(folder, table), described) == []


def test_unlike_notices_a_word_that_is_read_as_a_missing_value(tmp_path):
    """The word of older versions: 42 of 140 verdicts of a record came back as missing."""
    cells = cells_table()
    write_table(tmp_path, columns.CELLS, cells.assign(verdict="null", band=1))
    described = {column.name: column for column in columns.CELLS.columns}
    ours = cells.assign(verdict="null", band="1")
    assert sorted(unlike(pd.read_csv(tmp_path / "cells.csv"), ours, described)) == ["band", "verdict"]


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_every_word_of_a_table_stays_a_text(table):
    assert [word for column in table.columns for word in column.words if not stays_text(word)] == []


def test_stays_text_knows_what_a_reader_takes_for_something_else():
    assert [word for word in ("null", "NA", "1", "1e3", "True", "a", "same_base 2", *Verdict) if stays_text(word)] == [
        "a", "same_base 2", *Verdict
    ]  # fmt: skip

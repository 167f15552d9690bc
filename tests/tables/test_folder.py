"""A probe's folder: tables are written and read by their columns, and the page of columns is made of them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from attnres.errors import DataError
from attnres.tables import columns
from attnres.tables.docs import tables_page
from attnres.tables.folder import VIEWER, read_measured, read_table, table_text, write_table
from attnres.tables.names import Split
from attnres.tables.viewer import MOST_READ, Read, Shown, Viewer, read_viewer, viewer_text
from tests.tables.fake_folder import cells_table, routing_table, summary_table, window_tables, write_probe

ROOT = Path(__file__).parents[2]
CELLS = cells_table()
EFFECTS, MASS = window_tables(CELLS)


def test_tables_page_is_the_one_in_docs():
    assert (ROOT / "docs" / "tables.md").read_text(encoding="utf-8") == tables_page()


@pytest.mark.parametrize("table", [*columns.MEASURED, *columns.JUDGED], ids=lambda table: table.name)
def test_tables_describe_each_column_once(table):
    assert len(set(table.names)) == len(table.names)
    assert all(column.type == "text" for column in table.columns if column.words)


def test_write_table_writes_the_bytes_that_pandas_writes_of_the_columns_in_order(tmp_path):
    ordered = EFFECTS[columns.EFFECTS.required]
    ordered.to_parquet(tmp_path / "expected.parquet", index=False)
    shuffled = ordered[ordered.columns[::-1]]
    write_table(tmp_path, columns.EFFECTS, shuffled)
    write_table(tmp_path, columns.EFFECTS_AS_TEXT, shuffled)
    assert (tmp_path / "effects.parquet").read_bytes() == (tmp_path / "expected.parquet").read_bytes()
    assert (tmp_path / "effects.csv").read_bytes() == ordered.to_csv(index=False).encode()
    assert table_text(columns.EFFECTS, shuffled) == ordered.to_csv(index=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["effects.csv", "effects.parquet", "expected.parquet"]


def test_write_table_refuses_a_missing_and_an_unknown_column(tmp_path):
    with pytest.raises(ValueError, match=r"effects\.parquet: the column 'kl' is missing"):
        write_table(tmp_path, columns.EFFECTS, EFFECTS.drop(columns="kl"))
    with pytest.raises(ValueError, match=r"effects\.parquet: 'ndll' is none of its columns"):
        write_table(tmp_path, columns.EFFECTS, EFFECTS.assign(ndll=0.0))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("table", "frame"),
    [
        (columns.EFFECTS, EFFECTS),
        (columns.MASS, MASS),
        (columns.CELLS, CELLS),
        (columns.ROUTING, routing_table()),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_read_table_gives_back_what_write_table_wrote(tmp_path, table, frame):
    write_table(tmp_path, table, frame)
    read = read_table(tmp_path, table)
    for name in table.names:
        if name in frame:
            # As Python writes them: every digit counts, and whether a number is an integer.
            assert list(map(repr, read[name].tolist())) == list(map(repr, frame[name].tolist()))


def test_read_table_keeps_every_digit_whatever_the_parser_of_the_installed_pandas(tmp_path, monkeypatch):
    """Before version 3.1, pandas reads a fifth of all numbers from text one digit short."""
    numbers = [0.1 + 0.2, 1e-300, -2 / 3, 1 / 3, float("nan")]
    frame = CELLS.head(5).assign(dnll=numbers)
    write_table(tmp_path, columns.CELLS, frame)
    frame.assign(dnll=list(map(repr, numbers)))[["model", "dnll"]].to_parquet(tmp_path / "cells.parquet")
    parse, to_numeric = pd.read_csv, pd.to_numeric

    def one_digit_short(read):
        floats = read.select_dtypes("float64") if isinstance(read, pd.DataFrame) else read
        short = np.nextafter(floats, 0)
        return read.assign(**short) if isinstance(read, pd.DataFrame) else short

    monkeypatch.setattr(pd, "read_csv", lambda *given, **options: one_digit_short(parse(*given, **options)))
    monkeypatch.setattr(pd, "to_numeric", lambda values: one_digit_short(to_numeric(values)))
    np.testing.assert_array_equal(read_table(tmp_path, columns.CELLS)["dnll"], numbers)
    read = read_table(tmp_path, replace(columns.CELLS, name="cells.parquet"), only=["dnll"])
    np.testing.assert_array_equal(read["dnll"], numbers)


def test_read_table_keeps_names_that_look_like_no_value(tmp_path):
    names = ["NA", "nan", ""]
    write_table(tmp_path, columns.CELLS, CELLS.head(3).assign(model=names))
    assert read_table(tmp_path, columns.CELLS)["model"].tolist() == names


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"verdict": "causl"}, "column 'verdict' holds 'causl', none of excluded, negligible, causal, inconclusive"),
        ({"eligible": "perhaps"}, "column 'eligible' holds something that is neither true nor false"),
        ({"dnll": "large"}, "column 'dnll' holds something that is not a number"),
    ],
)
def test_read_table_names_file_column_and_value(tmp_path, change, message):
    write_table(tmp_path, columns.CELLS, CELLS.assign(**change))
    with pytest.raises(DataError) as error:
        read_table(tmp_path, columns.CELLS)
    assert f"{tmp_path / 'cells.csv'}: {message}" in str(error.value) and "\n" not in str(error.value)


def test_read_table_refuses_text_that_is_not_utf8(tmp_path):
    """pandas reads it, and whoever looks at a value of it fails."""
    table = pa.table(EFFECTS[columns.EFFECTS.required])
    damaged = pa.array([b"\xff"] * len(table), pa.binary()).view(pa.string())
    pq.write_table(table.set_column(table.column_names.index("cell"), "cell", damaged), tmp_path / "effects.parquet")
    with pytest.raises(DataError, match=r"effects\.parquet cannot be read \(.*[Ii]nvalid UTF8"):
        read_table(tmp_path, columns.EFFECTS)


def test_read_table_takes_an_empty_word_only_where_the_column_is_optional(tmp_path):
    write_table(tmp_path, columns.CELLS, CELLS.assign(correction=""))
    assert set(read_table(tmp_path, columns.CELLS)["correction"]) == {""}
    write_table(tmp_path, columns.EFFECTS, EFFECTS.assign(split=""))
    with pytest.raises(DataError, match="column 'split' holds '', none of pilot, confirm"):
        read_table(tmp_path, columns.EFFECTS)


def test_read_measured_refuses_a_split_that_is_none(tmp_path):
    """Unknown windows would silently be of neither split."""
    effects = EFFECTS.assign(split=EFFECTS["split"].replace(Split.CONFIRM, "confirmed"))
    listed = CELLS[columns.ELIGIBILITY.required]
    frames = {columns.EFFECTS: effects, columns.MASS: MASS, columns.ELIGIBILITY: listed}
    lists = {"cells": sorted(set(CELLS["cell"])), "exclusions": []}
    registered = dict.fromkeys(("statistics", "probe", "splits", "hashes"), {}) | lists
    write_probe(tmp_path, frames, registered, summary_table())
    with pytest.raises(DataError, match=r"effects\.parquet: column 'split' holds 'confirmed'"):
        read_measured(tmp_path)


def viewer() -> Viewer:
    read = Read(read=0, layer=0, sublayer="attn", sources=["a", "b"], families=["embedding", "current"])
    return Viewer("attnres", [read], [Shown(document="x.py", tokens=["x", "é"], weights=[[400, 600, 1, 999]])])


def test_read_viewer_gives_back_what_viewer_text_wrote(tmp_path):
    assert read_viewer(tmp_path) is None
    (tmp_path / VIEWER).write_text(viewer_text(viewer()), encoding="utf-8")
    assert read_viewer(tmp_path) == viewer()
    assert viewer_text(viewer()).startswith('{"format":1,"model":"attnres","reads":[{"read":0,"layer":0,"sublayer":')


def test_read_viewer_refuses_a_file_that_no_page_can_hold(tmp_path):
    (tmp_path / VIEWER).write_bytes(b" " * (MOST_READ + 1))
    with pytest.raises(DataError, match="more than 8000000 bytes: delete it, and the report has no viewer"):
        read_viewer(tmp_path)


def test_read_table_refuses_more_rows_than_its_bound_before_it_reads_them(tmp_path, monkeypatch):
    write_table(tmp_path, columns.EFFECTS, EFFECTS)
    monkeypatch.setattr("attnres.tables.folder._MOST_ROWS", len(EFFECTS) - 1)
    monkeypatch.setattr("pandas.read_parquet", lambda *_, **__: pytest.fail("read"))
    with pytest.raises(DataError, match=f"{len(EFFECTS):,} rows, at most {len(EFFECTS) - 1:,} are read"):
        read_table(tmp_path, columns.EFFECTS)

"""A probe's folder, written and read here: every table by its columns, every JSON object within bounds.

The tables are described in `attnres.tables.columns`. Two views of a folder are made of what is read here: `Measured`,
what a judgement needs, and `attnres.report.tables.Tables`, what a report needs.
"""

import hashlib
import io
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from pyarrow import parquet

from attnres.errors import ConfigError, DataError, one_line
from attnres.files import formats
from attnres.files.hashes import content_hash
from attnres.files.whole_files import read_object, whole_file
from attnres.tables import columns
from attnres.tables.columns import Column, Table

# The files that are no tables; the viewer's is described in `attnres.tables.viewer`.
PREREGISTRATION, SUMMARY, VIEWER = "preregistration.json", "summary.json", "viewer.json"
# Which version of each this code reads; what was registered has not changed since the first.
_VERSIONS = {PREREGISTRATION: formats.VERSION, SUMMARY: formats.PROBE_VERSION}
AGAIN = "run the probe again, or name the folder that it wrote"
# A table compresses: a file of a few bytes may claim any number of rows.
_MOST_ROWS = 100_000_000
_FLAGS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False, "": False}


@dataclass(frozen=True)
class Measured:
    """What a probe measured, and under which preregistration."""

    folder: Path
    effects: pd.DataFrame
    mass: pd.DataFrame
    eligibility: pd.DataFrame
    registered: Mapping[str, Any]
    summary: Mapping[str, Any]
    attribution: pd.DataFrame


def write_table(folder: Path, table: Table, frame: pd.DataFrame) -> None:
    """Writes a table whole or not at all, its columns in their order.

    Args:
        folder: of the probe.
        table: which file; its name says whether it is parquet or text.
        frame: every required column of the table, in any order; its index is not written.

    Raises:
        ValueError: a column is missing, or the table has no such column.
    """
    ordered = _ordered(table, frame)
    with whole_file(folder / table.name) as temporary:
        if table.name.endswith(".parquet"):
            ordered.to_parquet(temporary, index=False)
        else:
            ordered.to_csv(temporary, index=False)


def table_text(table: Table, frame: pd.DataFrame) -> str:
    """What `write_table` writes of a table that is text."""
    return _ordered(table, frame).to_csv(index=False)


def stays_text(word: str) -> bool:
    """Whether a reader of CSV at pandas' defaults gets this word back: not a number, a truth or a missing value."""
    column = pd.read_csv(io.StringIO(pd.DataFrame({"word": [word]}).to_csv(index=False)))["word"]
    return column.tolist() == [word]


def _ordered(table: Table, frame: pd.DataFrame) -> pd.DataFrame:
    if missing := table.missing(frame.columns):
        raise ValueError(f"{table.name}: the column {missing[0]!r} is missing")
    if unknown := [name for name in frame.columns if name not in table.names]:
        raise ValueError(f"{table.name}: {unknown[0]!r} is none of its columns, see attnres/tables/columns.py")
    return frame[[name for name in table.names if name in frame.columns]]


def read_table(folder: Path, table: Table, only: Sequence[str] = ()) -> pd.DataFrame:
    """Reads and checks a table of a probe.

    Args:
        folder: of the probe.
        table: which file.
        only: the columns to read of a parquet file, where not all are needed.

    Returns:
        The columns of `table` that the file has, in the types that it says (empty texts for missing ones).

    Raises:
        DataError: the file is missing or unreadable, a column is missing, or a value is none that may stand in its
            column; one line that names the file, the column and the value.
    """
    path = folder / table.name
    described = [column for column in table.columns if not only or column.name in only]
    if not path.is_file():
        raise DataError(f"{path} is missing: {AGAIN}")
    try:
        frame = _read_parquet(path, only) if path.suffix == ".parquet" else _read_text(path)
    except (ValueError, OSError) as error:  # pandas' parser errors and pyarrow's are ValueErrors
        raise DataError(f"{path} cannot be read ({one_line(error)}): {AGAIN}") from error
    for column in described:
        if column.name in frame:
            values = frame[column.name]
            typed = _typed(values, column, path)
            if typed is not values:
                frame[column.name] = typed
        elif not column.optional:
            raise DataError(f"{path} lacks the column '{column.name}': {AGAIN}")
    return frame[[name for name in frame.columns if name in table.names]]


def _read_parquet(path: Path, only: Sequence[str]) -> pd.DataFrame:
    with parquet.ParquetFile(path) as file:
        rows, present = file.metadata.num_rows, file.schema_arrow.names
        if rows > _MOST_ROWS:
            raise ValueError(f"{rows:,} rows, at most {_MOST_ROWS:,} are read")
        wanted = [name for name in only or present if name in present]
        # Text that is not UTF-8 would be noticed later, by whoever looks at it.
        file.read(columns=wanted).validate(full=True)
    return pd.read_parquet(path, columns=wanted)


def _read_text(path: Path) -> pd.DataFrame:
    # Everything as text, which `_typed` converts: a model may be called NA or nan, and before version 3.1 pandas reads
    # numbers one digit short unless `float_precision` is given, which is deprecated from that version on.
    return pd.read_csv(path, dtype=str, keep_default_na=False, low_memory=False)


def _typed(values: pd.Series, column: Column, path: Path) -> pd.Series:
    if column.type == "text":
        if not isinstance(values.dtype, pd.StringDtype) or values.hasnans:
            values = values.astype(object).where(values.notna(), "").map(str)
        for word in values.unique() if column.words else ():
            if word not in column.words and (word or not column.optional):
                known = ", ".join(column.words)
                raise DataError(f"{path}: column '{column.name}' holds {word[:60]!r}, none of {known}: {AGAIN}")
        return values
    if column.type == "flag":
        flags = values if values.dtype == bool else values.map(lambda v: _FLAGS.get(str(v).strip().lower()))
        if flags.isna().any():
            raise DataError(f"{path}: column '{column.name}' holds something that is neither true nor false: {AGAIN}")
        return flags.astype(bool)
    if values.dtype.kind in "iuf":
        return values
    try:
        return _numbers(values)
    except (ValueError, TypeError) as error:
        raise DataError(f"{path}: column '{column.name}' holds something that is not a number: {AGAIN}") from error


def _numbers(values: pd.Series) -> pd.Series:
    """Texts and other objects as Python reads them, every digit kept: integers where all are, else floats."""
    texts = values.astype(object).where(values.ne(""), "nan")
    if len(texts) and all(isinstance(text, str) and text.lstrip("-").isdigit() for text in texts):
        with suppress(OverflowError):
            return texts.astype("int64")
    return texts.astype("float64")


def read_described(folder: Path, name: str, older: bool = False) -> dict[str, Any]:
    """The JSON object of `PREREGISTRATION` or `SUMMARY`.

    Args:
        folder: of the probe.
        name: which.
        older: take a folder of an earlier version too, whose verdicts are not read.

    Raises:
        DataError: it is missing or unreadable, larger or deeper than is read, or of another format version.
    """
    path = folder / name
    try:
        plain = read_object(path)
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing: {AGAIN}") from error
    except (ValueError, OSError) as error:
        raise DataError(f"{path} cannot be read ({one_line(error)}): {AGAIN}") from error
    version = _VERSIONS[name]
    if not (older and plain.get(formats.KEY, 1) in range(1, version)):
        convert = f"python -m attnres.commands.rejudge {folder} --out OUT"
        formats.check_format(plain, path, DataError, f"judge an older one anew: {convert}", version)
    return plain


def require_folder(folder: Path) -> None:
    """Raises ConfigError where there is no such folder."""
    if not folder.is_dir():
        raise ConfigError(f"no probe folder at {folder}: {AGAIN}")


def read_measured(folder: Path, older: bool = False) -> Measured:
    """Reads what a probe measured, and checks it against its preregistration.

    Args:
        folder: of the probe.
        older: take a folder of an earlier version too, to judge it anew.

    Raises:
        ConfigError: there is no such folder.
        DataError: a file is missing or unreadable, or holds other windows or cells than were preregistered.
    """
    require_folder(folder)
    registered, summary = read_described(folder, PREREGISTRATION), read_described(folder, SUMMARY, older)
    estimated = (folder / columns.ATTRIBUTION.name).is_file()
    measured = Measured(
        folder=folder,
        effects=read_table(folder, columns.EFFECTS),
        mass=read_table(folder, columns.MASS),
        eligibility=read_table(folder, columns.ELIGIBILITY),
        registered=registered,
        summary=summary,
        attribution=read_table(folder, columns.ATTRIBUTION) if estimated else pd.DataFrame(),
    )
    _check(measured)
    return measured


def _check(measured: Measured) -> None:
    registered, folder = measured.registered, measured.folder
    for key in ("statistics", "probe", "splits", "hashes", "cells", "exclusions"):
        if key not in registered:
            raise DataError(f"{folder / PREREGISTRATION} lacks {key!r}: {AGAIN}")
    for table, frame in ((columns.EFFECTS, measured.effects), (columns.MASS, measured.mass)):
        for split, digests in _digests(registered["splits"], "look" in frame).items():
            rows = frame[frame["split"] == split]
            # What everything agreed on early was measured no further.
            for look in range(1, 1 + (min(len(digests), rows["look"].max()) if "look" in rows else len(rows) > 0)):
                drawn = rows[rows["look"] <= look] if "look" in rows else rows
                drawn = drawn[["window", "document"]].drop_duplicates()
                if windows_digest(drawn["window"].tolist(), drawn["document"].tolist()) != digests[look - 1]:
                    path = folder / table.name
                    raise DataError(
                        f"{path}: the rows of split {split!r} are not of the windows that were preregistered"
                    )
    models = measured.summary.get("models")
    if not (isinstance(models, list) and all(isinstance(row, dict) and "name" in row for row in models)):
        raise DataError(f"{folder / SUMMARY} does not name its models: {AGAIN}")
    unknown = set(measured.effects["cell"].unique()) - set(registered["cells"])
    if unknown:
        raise DataError(f"{folder}: effects of {min(unknown)}, which was not preregistered")
    excluded = {(row["model"], row["cell"]) for row in registered["exclusions"]}
    listed = measured.eligibility.set_index(["model", "cell"])["eligible"]
    for model, cell in excluded:
        if listed.get((model, cell), False):
            raise DataError(f"{folder}: {cell} of {model} is eligible, but was excluded when it was preregistered")


def _digests(splits: Mapping[str, Any], in_looks: bool) -> dict[str, list[str]]:
    """Per split, the digest of the windows up to each look."""
    if in_looks:
        return {split: [row["sha256"] for row in rows] for split, rows in splits.get("looks", {}).items()}
    return {split: [digest] for split, digest in splits.get("sha256", {}).items()}


def registered_as(path: Path) -> dict[str, Any]:
    """What results say about their preregistration: its `sha256` and when it was `written`; empty without one."""
    if not path.is_file():
        return {}
    content = path.read_bytes()
    return {"sha256": hashlib.sha256(content).hexdigest(), "written": read_object(path).get("written")}


def windows_digest(windows: Iterable[int], documents: Iterable[int]) -> str:
    """sha256 of which windows of which documents were drawn, whatever their order."""
    pairs = [list(pair) for pair in sorted(zip(windows, documents, strict=True))]
    return content_hash(pairs)

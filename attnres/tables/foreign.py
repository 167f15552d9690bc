"""A table that no probe made, read as its owner meant it: identifiers stay texts, and no number is missing.

Identifiers are never parsed: pandas at its defaults makes one unit of `7` and `007`, one head of `0.1` and `0.10`, and
a missing value of a unit called `NA`. Numbers are read to the last digit, and a value that is none is an error that
names its row, because every step after it would hide it. A mean over windows skips it; corrections of statsmodels turn
the whole family into NaN (Benjamini-Hochberg), or reject the test that has no p (Holm).
"""

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.csv
from pyarrow import parquet

from attnres.config import nearest
from attnres.errors import ConfigError, DataError, one_line

# What a column is for -> the names that are looked for where none is given, first come first served.
IDENTIFIERS = {"unit": ("unit", "document"), "component": ("component", "cell"), "group": ("group",)}
NUMBERS = {"effect": ("effect", "dnll"), "second": ("second", "kl"), "control": ("control",)}
ROLES = IDENTIFIERS | NUMBERS
REQUIRED = ("unit", "component", "effect")
_MOST_ROWS = 100_000_000


@dataclass(frozen=True)
class Foreign:
    """A table by roles instead of its own names.

    Attributes:
        rows: columns of `ROLES` that the table has; identifiers as texts, numbers as float64, all finite but for
            `control`, which may be NaN. Its index is the number of the row in the file, 1 for the first.
        names: role -> the names of the columns that it was read from.
    """

    path: Path
    rows: pd.DataFrame
    names: Mapping[str, Sequence[str]]


def read_foreign(path: Path, named: Mapping[str, Sequence[str]]) -> Foreign:
    """Reads `.csv` or `.parquet`.

    Args:
        path: of the table.
        named: role -> columns. Several columns name a unit, a component or a group together. A role that is left out is
            looked for under the names in `ROLES`.

    Raises:
        ConfigError: another kind of file, or a column that the table lacks.
        DataError: the table cannot be read or is empty, an identifier is missing, a value is no finite number, or two
            rows are the same.
    """
    if path.suffix not in (".csv", ".parquet"):
        raise ConfigError(f"{path}: expected a .csv or .parquet table")
    try:
        table = _read_parquet(path) if path.suffix == ".parquet" else _read_csv(path)
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing: name a .csv or .parquet table") from error
    except (ValueError, OSError, csv.Error) as error:  # pandas' parser errors and pyarrow's are ValueErrors
        raise DataError(f"{path} cannot be read as a table: {one_line(error)}") from error
    names = {role: given for role in ROLES if (given := _columns_of(role, named.get(role, ()), table, path))}
    identifying = [name for role in IDENTIFIERS for name in names.get(role, ())]
    if len(set(identifying)) < len(identifying):
        raise ConfigError(f"{path}: one column is more than one of {', '.join(f'--{role}' for role in IDENTIFIERS)}")
    if table.empty:
        raise DataError(f"{path} has no rows: nothing can be judged")
    table.index = pd.RangeIndex(1, len(table) + 1)
    texts = {role: _texts(table[list(names[role])], role, path) for role in IDENTIFIERS if role in names}
    rows = pd.DataFrame(texts, index=table.index)
    for role in NUMBERS:
        if role in names:
            rows[role] = _numbers(table[names[role][0]], role, rows, path)
    repeated = table.duplicated()
    if repeated.any():
        second = repeated.idxmax()
        first = table.loc[:second].duplicated(keep=False).idxmax()
        raise DataError(
            f"{path}: rows {first} and {second} ({_where(rows.loc[second])}) are the same in every column: remove one, "
            "or add a column that tells them apart, e.g. the prompt"
        )
    return Foreign(path, rows, names)


def stay_texts(column: pd.Series) -> bool:
    """Whether readers of CSV at the defaults of pandas and pyarrow get the texts of a column back."""
    texts = list(column.unique())
    written = pd.DataFrame({"column": texts}).to_csv(index=False)
    try:
        read = pyarrow.csv.read_csv(io.BytesIO(written.encode("utf-8", errors="replace")))["column"].to_pylist()
    except pa.ArrowInvalid:  # a line break in a name
        return False
    return read == pd.read_csv(io.StringIO(written))["column"].tolist() == texts


def _read_parquet(path: Path) -> pd.DataFrame:
    with parquet.ParquetFile(path) as file:
        if file.metadata.num_rows > _MOST_ROWS:
            raise ValueError(f"{file.metadata.num_rows:,} rows, at most {_MOST_ROWS:,} are read")
        # Without pandas' metadata an index is a column like the others.
        table = file.read()
        table.validate(full=True)  # text that is not UTF-8 would be noticed later, by whoever looks at it
    columns = {name: table[name].to_pandas() for name in _unlike(table.column_names)}
    nested = [name for name in columns if pa.types.is_nested(table.schema.field(name).type)]
    return pd.DataFrame(columns | {name: columns[name].map(str) for name in nested})


def _read_csv(path: Path) -> pd.DataFrame:
    with open(path, encoding="utf-8-sig", newline="") as file:
        header = next(csv.reader(file), [])
    if not header:
        raise ValueError("it is empty")
    table = pa.csv.read_csv(
        path,
        read_options=pa.csv.ReadOptions(column_names=_unlike(header), skip_rows=1),
        parse_options=pa.csv.ParseOptions(newlines_in_values=True),
        convert_options=pa.csv.ConvertOptions(
            column_types={name: pa.string() for name in header}, strings_can_be_null=False
        ),
    )
    return table.to_pandas()


def _unlike(names: Sequence[str]) -> list[str]:
    for place, name in enumerate(names):
        if name in names[:place]:
            raise ValueError(f"two columns are called {name!r}")
    return list(names)


def _columns_of(role: str, given: Sequence[str], table: pd.DataFrame, path: Path) -> tuple[str, ...]:
    """The columns of a role; none where the table lacks one that need not be there."""
    known = list(map(str, table.columns))
    for name in given:
        if name not in known:
            raise ConfigError(f"{path} has no column {name!r} (--{role}); {_hint([name], known)}")
    if given or role not in REQUIRED:
        return tuple(given) or tuple(name for name in ROLES[role] if name in known)[:1]
    found = [name for name in ROLES[role] if name in known]
    if not found:
        expected = " or ".join(repr(name) for name in ROLES[role])
        raise ConfigError(f"{path} has no column {expected}: name it with --{role}; {_hint(ROLES[role], known)}")
    return (found[0],)


def _hint(wanted: Sequence[str], known: Sequence[str]) -> str:
    guesses = (nearest(name.lower(), [name.lower() for name in known]) for name in wanted)
    guess = next(filter(None, guesses), None)
    columns = f"its columns: {', '.join(known)}"
    if len(known) == 1 and set(known[0]) & set(";\t|"):
        return f"{columns}; separate columns by commas"
    close = next((name for name in known if name.lower() == guess), None)
    return f"did you mean {close!r}? {columns}" if close else columns


def _texts(columns: pd.DataFrame, role: str, path: Path) -> pd.Series:
    """Identifiers; several columns are joined, and what a reader would take for a number carries its column's name."""
    parts = []
    for name in columns:
        values = columns[name]
        lacking = values.isna() | (values.astype(str).str.strip() == "")
        if lacking.any():
            raise DataError(f"{path}: row {lacking.idxmax()} has no {role} (column {str(name)!r})")
        part = values.astype(str)
        parts.append(part if role == "unit" or stay_texts(part) else f"{name} " + part)
    joined = parts[0].str.cat(parts[1:], sep=" ") if len(parts) > 1 else parts[0]
    if joined.nunique() != len(pd.concat(parts, axis=1).drop_duplicates()):
        raise DataError(f"{path}: different {role}s have the same name once {', '.join(map(str, columns))} are joined")
    return joined


def _numbers(values: pd.Series, role: str, rows: pd.DataFrame, path: Path) -> pd.Series:
    try:
        numbers = values.astype("float64")
    except (ValueError, TypeError):
        numbers = pd.Series([_number(value) for value in values], index=values.index)
    bad = ~(numbers.abs() < math.inf)
    if role == "control":
        # A component without a control has none in any row.
        empty = values.isna() | values.astype(str).str.strip().isin(["", "nan", "NaN"])
        without = empty.groupby(rows["component"] if "group" not in rows else [rows["group"], rows["component"]])
        bad &= ~without.transform("all")
    if bad.any():
        row = bad.idxmax()
        raise DataError(
            f"{path}: row {row} ({_where(rows.loc[row])}): {role} is {str(values.loc[row])!r}, expected a finite "
            "number; measure it again, or leave that unit out of every component"
        )
    return numbers


def _number(value: object) -> float:
    try:
        return float(value)  # type: ignore[arg-type]
    except (ValueError, TypeError):
        return math.nan


def _where(row: pd.Series) -> str:
    return ", ".join(_said(row))


def _said(row: pd.Series) -> Iterator[str]:
    for role in ("unit", "component", "group"):
        if role in row:
            yield f"{role} {row[role]}"

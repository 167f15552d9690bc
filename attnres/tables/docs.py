"""`docs/tables.md` from the columns: `python -m attnres.tables.docs > docs/tables.md`."""

import sys
from collections.abc import Iterator

from attnres.tables import columns
from attnres.tables.columns import Column, Table

_HEAD = """\
# The tables of a probe

`python -m attnres.tables.docs > docs/tables.md` writes this page from `attnres/tables/columns.py`, which also decides
how the tables are written and read. A column with a star may be absent, and its values may be empty.

What each word means stands beside it in `attnres/tables/names.py`. Reading by code: `attnres.tables.folder.read_table`.
"""


def tables_page() -> str:
    """The page: every file, every column."""
    chapters = {"Measured": columns.MEASURED, "Judged": columns.JUDGED, "Anybody's": (columns.COMPONENTS,)}
    return "\n".join([_HEAD, *(line for title, tables in chapters.items() for line in _chapter(title, tables))])


def _chapter(title: str, tables: tuple[Table, ...]) -> Iterator[str]:
    yield f"## {title}\n"
    for table in tables:
        yield f"### {table.name}\n\nA row: {table.meaning}.\n"
        yield "| column | type | unit | meaning |\n|---|---|---|---|"
        yield from (_row(column) for column in table.columns)
        yield ""


def _row(column: Column) -> str:
    words = ", ".join(f"`{word}`" for word in column.words)
    meaning = f"{column.meaning}: {words}" if words else column.meaning
    cells = (f"`{column.name}`{'*' * column.optional}", column.type, column.unit, meaning.replace("|", "\\|"))
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    sys.stdout.write(tables_page())

"""The viewer's data, made fit to stand inside a page: it holds text of documents, which may be anything."""

from dataclasses import replace
from pathlib import Path

from markupsafe import Markup

from attnres.tables.viewer import compact, read_viewer

_SIGNS = {" ": "·", "\n": "⏎", "\t": "⇥", "\r": "␍"}
_ESCAPES = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"})


def viewer_data(folder: Path) -> Markup | None:
    """The data of `viewer.json` as JSON for a script element that is not run; None where a probe wrote none.

    Every string in it is printable: spaces and line ends become signs, other control characters and marks of
    direction their code points. `<`, `>` and `&` are escaped, so that nothing in it can end the element.

    Raises:
        DataError: the file is too large, or not what a probe writes.
    """
    viewer = read_viewer(folder)
    if viewer is None:
        return None
    reads = [
        replace(
            read,
            sublayer=token_text(read.sublayer),
            sources=[_name(source) for source in read.sources],
            families=[token_text(family) for family in read.families],
        )
        for read in viewer.reads
    ]
    sequences = [
        replace(row, document=_name(row.document, 80), tokens=[token_text(token) for token in row.tokens])
        for row in viewer.sequences
    ]
    shown = replace(viewer, model=_name(viewer.model), reads=reads, sequences=sequences)
    return Markup(compact(shown.plain()).translate(_ESCAPES))


def token_text(token: str, width: int = 60) -> str:
    """A token as a reader can see it: `\\n` as ⏎, U+202E by its name, at most `width` characters."""
    signs = (c if c.isprintable() and c != " " else _SIGNS.get(c, f"⟨U+{ord(c):04X}⟩") for c in token[:width])
    return "".join(signs) + ("…" if len(token) > width else "")


def _name(text: str, width: int = 60) -> str:
    """A name, whose spaces stay spaces."""
    return token_text(text, width).replace("·", " ")

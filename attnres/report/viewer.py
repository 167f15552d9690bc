"""`viewer.json`, checked and made fit to stand inside a page: it holds text of documents, which may be anything."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from attnres.errors import DataError
from attnres.files.whole_files import read_object
from attnres.report.tables import one_line

NAME, FORMAT = "viewer.json", 1
MAX_BYTES = 8_000_000
_SIGNS = {" ": "·", "\n": "⏎", "\t": "⇥", "\r": "␍"}
_ESCAPES = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"})


def read_viewer(folder: Path) -> Markup | None:
    """The viewer's data as JSON for a script element that is not run; None where a probe wrote none.

    Every string in it is printable: spaces and line ends become signs, other control characters and marks of
    direction their code points. `<`, `>` and `&` are escaped, so that nothing in it can end the element.

    Raises:
        DataError: the file is too large, or not what a probe writes.
    """
    path = folder / NAME
    if not path.is_file():
        return None
    if path.stat().st_size > MAX_BYTES:
        raise DataError(f"{path} has more than {MAX_BYTES} bytes: delete it, and the report has no viewer")
    try:
        shown = _checked(read_object(path))
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        raise DataError(
            f"{path} is not what a probe writes ({one_line(error)}): delete it, and the report has no viewer"
        ) from error
    text = json.dumps(shown, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return Markup(text.translate(_ESCAPES))


def token_text(token: str, width: int = 60) -> str:
    """A token as a reader can see it: `\\n` as ⏎, U+202E by its name, at most `width` characters."""
    signs = (c if c.isprintable() and c != " " else _SIGNS.get(c, f"⟨U+{ord(c):04X}⟩") for c in token[:width])
    return "".join(signs) + ("…" if len(token) > width else "")


def _checked(raw: Mapping[str, Any]) -> dict[str, Any]:
    if raw["format"] != FORMAT:
        raise ValueError(f"format {raw['format']!r} instead of {FORMAT}")
    reads: list[dict[str, Any]] = [
        {
            "read": int(read["read"]),
            "layer": int(read["layer"]),
            "sublayer": token_text(read["sublayer"]),
            "sources": [token_text(name).replace("·", " ") for name in read["sources"]],
            "families": [token_text(name) for name in read["families"]],
        }
        for read in raw["reads"]
    ]
    sequences = []
    for sequence in raw["sequences"]:
        tokens = [token_text(token) for token in sequence["tokens"]]
        if len(sequence["weights"]) != len(reads):
            raise ValueError("a sequence has not one list of weights for each read")
        for read, weights in zip(reads, sequence["weights"], strict=True):
            if len(weights) != len(tokens) * len(read["sources"]) or len(read["families"]) != len(read["sources"]):
                raise ValueError(f"read {read['read']} has not one weight for each token and source")
        whole = [[int(w) for w in weights] for weights in sequence["weights"]]
        document = token_text(sequence["document"], 80).replace("·", " ")
        sequences.append({"document": document, "tokens": tokens, "weights": whole})
    if not reads or not sequences:
        raise ValueError("no reads or no sequences")
    return {"model": token_text(raw["model"]).replace("·", " "), "reads": reads, "sequences": sequences}

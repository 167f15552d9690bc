"""`viewer.json`: the tokens and routing weights that the report shows one by one; its schema, its text and its limits.

Token strings may be anything: whoever shows them takes them for hostile (`attnres.report.viewer`).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnres.errors import DataError, one_line
from attnres.files.whole_files import read_object
from attnres.tables.folder import VIEWER

FORMAT = 1
# What a probe writes at most: sequences, tokens of each, bytes; and how large a file may be inside a page.
SEQUENCES, TOKENS = 4, 64
MOST_WRITTEN, MOST_READ = 1_400_000, 8_000_000


@dataclass(frozen=True)
class Read:
    """A read: its number and layer, the sublayer that it feeds, and S sources by name and family, oldest first."""

    read: int
    layer: int
    sublayer: str
    sources: Sequence[str]
    families: Sequence[str]


@dataclass(frozen=True)
class Shown:
    """A window: its document, `tokens [T]`, and per read `weights [T * S]` in thousandths, token by token."""

    document: str
    tokens: Sequence[str]
    weights: Sequence[Sequence[int]]


@dataclass(frozen=True)
class Viewer:
    """What the file holds.

    Raises:
        ValueError: there is nothing to show, or a sequence has not one weight for each read, token and source.
    """

    model: str
    reads: Sequence[Read]
    sequences: Sequence[Shown]

    def __post_init__(self) -> None:
        if not self.reads or not self.sequences:
            raise ValueError("no reads or no sequences")
        for read in self.reads:
            if len(read.families) != len(read.sources):
                raise ValueError(f"read {read.read} has not one family for each source")
        for shown in self.sequences:
            if len(shown.weights) != len(self.reads):
                raise ValueError("a sequence has not one list of weights for each read")
            for read, weights in zip(self.reads, shown.weights, strict=True):
                if len(weights) != len(shown.tokens) * len(read.sources):
                    raise ValueError(f"read {read.read} has not one weight for each token and source")

    def plain(self) -> dict[str, Any]:
        """The same as JSON values, in the order in which they are written."""
        return {
            "model": self.model,
            "reads": [vars(read) for read in self.reads],
            "sequences": [vars(shown) for shown in self.sequences],
        }


def viewer_text(viewer: Viewer) -> str:
    """The text of the file."""
    return compact({"format": FORMAT} | viewer.plain())


def compact(plain: Mapping[str, Any]) -> str:
    """JSON without spaces; NaN is refused."""
    return json.dumps(plain, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def read_viewer(folder: Path) -> Viewer | None:
    """What a probe wrote for the viewer; None where it wrote nothing.

    Raises:
        DataError: the file is too large, or not what a probe writes.
    """
    path = folder / VIEWER
    if not path.is_file():
        return None
    remedy = "delete it, and the report has no viewer"
    if path.stat().st_size > MOST_READ:
        raise DataError(f"{path} has more than {MOST_READ} bytes: {remedy}")
    try:
        return _checked(read_object(path))
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        raise DataError(f"{path} is not what a probe writes ({one_line(error)}): {remedy}") from error


def _checked(plain: Mapping[str, Any]) -> Viewer:
    if plain["format"] != FORMAT:
        raise ValueError(f"format {plain['format']!r} instead of {FORMAT}")
    reads = [
        Read(
            read=int(read["read"]),
            layer=int(read["layer"]),
            sublayer=_text(read["sublayer"]),
            sources=[_text(name) for name in read["sources"]],
            families=[_text(name) for name in read["families"]],
        )
        for read in plain["reads"]
    ]
    sequences = [
        Shown(
            document=_text(sequence["document"]),
            tokens=[_text(token) for token in sequence["tokens"]],
            weights=[[int(weight) for weight in weights] for weights in sequence["weights"]],
        )
        for sequence in plain["sequences"]
    ]
    return Viewer(_text(plain["model"]), reads, sequences)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.60} is no text")
    return value

"""Streams of documents that can be left at any document and taken up behind it: local files, or a hub's data set."""

import hashlib
import json
import logging
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from itertools import islice
from typing import Any

from attnres.data.config import DataConfig
from attnres.data.text.sources import Document, list_files, listing, read_file, text_of
from attnres.errors import AttnResError, DataError, one_line

logger = logging.getLogger(__name__)


class Stream(ABC):
    """Documents in a fixed order."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What the documents are, as JSON: two equal identities are taken for the same documents."""

    @abstractmethod
    def read(self, state: Any) -> Iterator[tuple[Document, Any]]:
        """Yields each document after `state` (None: from the beginning) with the state behind it, which is JSON.

        Raises:
            DataError: The text is missing or cannot be read.
        """

    @property
    def bytes(self) -> int | None:
        """Roughly how much text there is, or None if that is not known before it is read."""
        return None


@dataclass(frozen=True)
class FileStream(Stream):
    """Files: texts and installed sources are a document each, the other formats hold a document per row.

    Attributes:
        config: Names the files; its order is that of the documents.
    """

    config: DataConfig

    def identity(self) -> dict[str, Any]:
        """Paths, and name, size and modification time of every file."""
        files = [list(row) for row in listing(self.config)]
        return {"paths": list(self.config.paths), "column": self.config.text_column, "files": files}

    def read(self, state: Any) -> Iterator[tuple[Document, Any]]:
        """A state is [file, number of the last document read in it]."""
        start, after = state or (0, 0)
        strict = self.config.source == "files"
        for index, file in enumerate(list_files(self.config)[start:], start=start):
            for number, document in read_file(file, self.config.text_column, strict, after if index == start else 0):
                yield document, [index, number]

    @property
    def bytes(self) -> int:
        """Size of the files."""
        return sum(size for _, size, _ in listing(self.config))


@dataclass(frozen=True)
class HubStream(Stream):
    """A Hugging Face data set, read over the network row by row and never stored as a whole.

    Attributes:
        name: Repository, such as "HuggingFaceFW/fineweb-edu".
        config: Configuration of the data set, or None for its default one.
        revision: Commit; see `resolve_revision`.
        name_column: Column that names a document, if the data set has it; else rows are numbered.
    """

    name: str
    config: str | None = None
    split: str = "train"
    revision: str = "main"
    column: str = "text"
    name_column: str = "id"

    def identity(self) -> dict[str, Any]:
        """The fields that decide its documents."""
        return {
            "hub": self.name,
            "config": self.config,
            "split": self.split,
            "revision": self.revision,
            "column": self.column,
        }

    def read(self, state: Any) -> Iterator[tuple[Document, Any]]:
        """A state is what `_Rows.state` gives, or what earlier versions kept: [state of the library, rows read]."""
        rows = _Rows(self)
        if state:
            rows.go_on(state if isinstance(state, dict) else {"rows": state[1]})
        for row in rows:
            where = f"{self.name}, row {rows.count}"
            if self.column not in row:
                raise DataError(f"{self.name}: no column {self.column!r} in {sorted(row)}; set --text-column")
            name = str(row.get(self.name_column) or f"{self.name}:{rows.count}")
            yield Document(name, text_of(row[self.column], where, self.column)), rows.state()


# Rows that are read again behind a stop: one alone may be blank, as the first of the data set may be.
_ROWS_COMPARED = 8


class _Rows:
    """The rows of a hub's data set, which can be left and taken up again without trusting the library's position.

    A state lies some rows back and holds a digest of these rows. They are read again: where they are others, the rows
    are counted from the first one on, which is slow and right.

    Attributes:
        count: Rows read, those of earlier sessions included.
    """

    def __init__(self, stream: HubStream) -> None:
        self.count = 0
        self._stream = stream
        self._begin(None)

    def _begin(self, library: Any) -> None:
        self._library = load_hub(self._stream.name, self._stream.config, self._stream.split, self._stream.revision)
        # Where the library stands, and the last rows: where it stood before each, and the digest of the row.
        self._at = library
        self._behind: deque[tuple[Any, str]] = deque(maxlen=_ROWS_COMPARED)
        if library is not None:
            self._library.load_state_dict(library)
        self._rows: Iterator[dict[str, Any]] = iter(self._library)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            name = self._stream.name
            with hub_errors(
                f"{name}: reading stopped after row {self.count}", "run the same command again to go on from there"
            ):
                try:
                    row = next(self._rows, None)
                except UnicodeError as error:
                    raise DataError(
                        f"{name}: text behind row {self.count} is not UTF-8 ({one_line(error)}); give another data set "
                        "or revision"
                    ) from error
            if row is None:
                return
            read = [row.get(column) for column in (self._stream.name_column, self._stream.column)]
            self._behind.append((self._at, _digest(read)))
            self._at = self._library.state_dict()
            self.count += 1
            yield row

    def state(self) -> dict[str, Any]:
        """The place behind the last row, as JSON."""
        place = {"library": self._behind[0][0], "compared": len(self._behind), "sha256": self._seen()}
        return {"rows": self.count} | place

    def go_on(self, state: dict[str, Any]) -> None:
        """Goes on behind the row at which `state` was taken.

        Raises:
            DataError: The data set does not hold the rows that were read before.
        """
        expected = state.get("sha256")
        if expected is not None and self._skip(state["library"], state["compared"]) == expected:
            self.count = state["rows"]
            return
        logger.warning(
            "%s: datasets %s does not find row %d again; the rows before it are read again and counted",
            self._stream.name, metadata.version("datasets"), state["rows"],
        )  # fmt: skip
        found = self._skip(None, state["rows"])
        if self.count != state["rows"] or (expected is not None and found != expected):
            raise DataError(
                f"{self._stream.name}: the rows up to {state['rows']} are not those that were read before; delete the "
                "unfinished folder and run the same command again"
            )

    def _skip(self, library: Any, rows: int) -> str:
        """Reads so many rows from a place of the library on; returns the digest of the last ones."""
        self.count = 0
        self._begin(library)
        for _ in islice(self, rows):
            pass
        return self._seen()

    def _seen(self) -> str:
        return _digest([digest for _, digest in self._behind])


def _digest(values: list[Any]) -> str:
    return hashlib.sha256(json.dumps(values, default=str).encode()).hexdigest()


_NO_HUB = "check the name and the network, or give local files with --paths"


def load_hub(name: str, config: str | None, split: str, revision: str) -> Any:
    """The rows of a data set on the hub, as `datasets` streams them: in order, and with an exact position.

    Raises:
        DataError: It cannot be reached.
    """
    import datasets

    with hub_errors(f"{name}: cannot be read from the hub", _NO_HUB):
        return datasets.load_dataset(name, config, split=split, revision=revision, streaming=True)


def resolve_revision(name: str, revision: str) -> str:
    """The commit that a branch or tag of a data set stands for.

    Raises:
        DataError: The hub cannot be reached.
    """
    import huggingface_hub

    with hub_errors(f"{name}: cannot be found on the hub", _NO_HUB):
        return str(huggingface_hub.HfApi().dataset_info(name, revision=revision).sha)


@contextmanager
def hub_errors(what: str, remedy: str) -> Iterator[None]:
    """What a hub's client raises, as one line. It has no common base: an httpx error is no OSError and no ValueError.

    Raises:
        DataError: `{what} ({the client's error}); {remedy}`.
    """
    try:
        yield
    except AttnResError:
        raise
    except Exception as error:
        raise DataError(f"{what} ({type(error).__name__}: {one_line(error, most=200)}); {remedy}") from error

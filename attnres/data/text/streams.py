"""Streams of documents that can be left at any document and taken up behind it: local files, or a hub's data set."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from attnres.data.config import DataConfig
from attnres.data.text.sources import Document, list_files, listing, read_file, text_of
from attnres.errors import DataError, one_line

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
    """Files: `.txt` and installed sources are a document each, `.jsonl` and `.parquet` a document per row.

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
        """A state is [state of the library, rows read]."""
        rows = load_hub(self.name, self.config, self.split, self.revision)
        at, before = state or (None, 0)
        number = before
        if at is not None:
            rows.load_state_dict(at)
        try:
            for number, row in enumerate(rows, start=before + 1):
                if self.column not in row:
                    raise DataError(f"{self.name}: no column {self.column!r} in {sorted(row)}; set --text-column")
                name = str(row.get(self.name_column) or f"{self.name}:{number}")
                text = text_of(row[self.column], f"{self.name}, row {number}", self.column)
                yield Document(name, text), [rows.state_dict(), number]
        except (OSError, ValueError) as error:
            raise DataError(
                f"{self.name}: reading stopped after row {number} ({one_line(error, most=200)}); run the same "
                "command again to go on from there"
            ) from error


def load_hub(name: str, config: str | None, split: str, revision: str) -> Any:
    """The rows of a data set on the hub, as `datasets` streams them: in order, and with an exact position.

    Raises:
        DataError: It cannot be reached.
    """
    import datasets

    try:
        return datasets.load_dataset(name, config, split=split, revision=revision, streaming=True)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{name}: cannot be read from the hub ({one_line(error, most=200)}); check the name and the "
            "network, or give local files with --paths"
        ) from error


def resolve_revision(name: str, revision: str) -> str:
    """The commit that a branch or tag of a data set stands for.

    Raises:
        DataError: The hub cannot be reached.
    """
    import huggingface_hub

    try:
        return str(huggingface_hub.HfApi().dataset_info(name, revision=revision).sha)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{name}: cannot be found on the hub ({one_line(error, most=200)}); check the name and the "
            "network, or give local files with --paths"
        ) from error

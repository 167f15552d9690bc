"""Finished pieces of a probe's tables, kept on disk from the moment they are finished.

A piece is a table of one kind for one model, split and batch of windows: a parquet file whose name ends with the sha256
of its bytes. It appears under its name whole or not at all, and is verified before it is used. The folder's name is a
hash of everything that the pieces depend on (`pieces_folder`), so that those of another configuration are never mixed
in.
"""

import hashlib
import io
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from attnres.config import to_plain
from attnres.files.hashes import content_hash, sha256_of
from attnres.files.provenance import source_digest, versions
from attnres.files.whole_files import whole_file
from attnres.interventions.config import GridConfig

log = logging.getLogger(__name__)

# Where a probe's folder keeps them until its tables are written.
PIECES = "parts"
# The rooms whose code a piece depends on. How results are judged and worded is not among them.
MEASURING_ROOMS = ("data/windows", "depth", "interventions", "model", "ops", "probe", "tables")
_NAME = re.compile(r"([a-z_0-9]+)\.([a-z]+)\.(\d+)\.([a-z]+)\.(\d+)\.([0-9a-f]{64})\.parquet")
STOP = ".stop"


class Key(NamedTuple):
    """Which piece: `kind` is `"effects"` (some cells of the batch), `"mass"`, `"routing"`, `"clean"` or
    `"attribution"`.
    """

    model: str
    split: str
    batch: int
    kind: str


def pieces_folder(folder: Path, config: GridConfig, hashes: Mapping[str, Any], device: str) -> Path:
    """Where the pieces of a probe are kept.

    Args:
        device: `"cpu"` or `"cuda"`.
    """
    measured_on = [to_plain(config), dict(hashes), versions(), source_digest(MEASURING_ROOMS), device]
    return folder / PIECES / content_hash(measured_on)[:16]


class Pieces:
    """The pieces of one probe.

    Args:
        folder: where they are kept; None keeps them in memory.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._pieces: dict[Key, dict[int, Path | pd.DataFrame]] = {}
        self.refresh()

    def refresh(self) -> None:
        """Look at the folder again, where other processes write as well; damaged pieces are left out."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self._pieces = {}
        for path in sorted(self.folder.iterdir()):
            match = _NAME.fullmatch(path.name)
            if match is None:
                continue
            if sha256_of(path) != match[6]:
                log.warning("%s: sha256 differs from its name; measured again", path)
                continue
            key = Key(match[1], match[2], int(match[3]), match[4])
            self._pieces.setdefault(key, {})[int(match[5])] = path

    def has(self, key: Key) -> bool:
        return key in self._pieces

    def read(self, key: Key) -> pd.DataFrame:
        """All pieces of a key in one table; empty where there are none."""
        frames = [_load(piece) for _, piece in sorted(self._pieces.get(key, {}).items(), key=lambda item: item[0])]
        return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()

    def last(self, key: Key) -> pd.DataFrame:
        """The newest piece of a key: of those that are not added to but measured again, where one of them was lost."""
        pieces = self._pieces[key]
        return _load(pieces[max(pieces)])

    def cells(self, key: Key) -> set[str]:
        """Ids of the cells that are finished."""
        table = self.read(key)
        return set(table["cell"]) if len(table) else set()

    def put(self, key: Key, frame: pd.DataFrame) -> None:
        """Keep a piece."""
        pieces = self._pieces.setdefault(key, {})
        number = max(pieces, default=-1) + 1
        pieces[number] = frame if self.folder is None else self._write(key, number, frame)

    def _write(self, key: Key, number: int, frame: pd.DataFrame) -> Path:
        assert self.folder is not None
        buffer = io.BytesIO()
        frame.to_parquet(buffer, index=False)
        content = buffer.getvalue()
        name = f"{key.model}.{key.split}.{key.batch:05d}.{key.kind}.{number:05d}.{hashlib.sha256(content).hexdigest()}"
        path = self.folder / f"{name}.parquet"
        with whole_file(path) as temporary:
            temporary.write_bytes(content)
        return path

    def ask_to_stop(self) -> None:
        """Tell the other processes that one was asked to stop."""
        if self.folder is not None:
            (self.folder / STOP).touch()

    def asked_to_stop(self) -> bool:
        return self.folder is not None and (self.folder / STOP).exists()

    def remove_leftovers(self) -> None:
        """Forget an earlier wish to stop and what a killed process left half written; name pieces that are not used."""
        if self.folder is None:
            return
        for path in (self.folder / STOP, *self.folder.glob(".tmp-*")):
            path.unlink(missing_ok=True)
        if [path for path in self.folder.parent.iterdir() if path != self.folder]:
            log.warning("%s: pieces of another version or configuration are measured anew", self.folder.parent)


def _load(piece: Path | pd.DataFrame) -> pd.DataFrame:
    return piece if isinstance(piece, pd.DataFrame) else pd.read_parquet(io.BytesIO(piece.read_bytes()))

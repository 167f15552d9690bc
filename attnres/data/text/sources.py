"""Where the text comes from: iterators of documents, and a cheap listing that tells when they changed."""

import glob
import json
import logging
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from attnres.data.config import DataConfig
from attnres.errors import DataError

logger = logging.getLogger(__name__)

FILE_SUFFIXES = (".txt", ".jsonl", ".parquet")
PYTHON_SUFFIXES = (".py",)
PACKAGE_SUFFIXES = (".py", ".pyi", ".md", ".rst", ".txt")

# Rows of web text that are decoded at once: a few MB.
_PARQUET_ROWS = 256

_SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
_SKIPPED_ENDINGS = (".dist-info", ".egg-info")
# Generated when the interpreter was built: it holds that machine's paths, and would make the corpora of two
# machines with the same Python differ.
_SKIPPED_PREFIX = "_sysconfigdata"


@dataclass(frozen=True)
class Document:
    """One document: a name that tells a reader where it came from, and its text."""

    name: str
    text: str

    def __post_init__(self) -> None:
        # The name of a file may hold bytes that are not UTF-8, which no table can hold.
        object.__setattr__(self, "name", self.name.encode("utf-8", "backslashreplace").decode())


@dataclass(frozen=True)
class SourceFile:
    """A file to read documents from, and the name that its documents carry."""

    path: Path
    name: str


def list_files(config: DataConfig) -> list[SourceFile]:
    """The files that `config` reads, in the order in which their documents are numbered.

    Raises:
        DataError: A path does not exist, has a format that is not read, or nothing was found.
    """
    if config.source == "pystdlib":
        files = _walk(Path(sysconfig.get_path("stdlib")), PYTHON_SUFFIXES)
    elif config.source == "pyenv":
        # purelib and platlib are one folder on most systems.
        roots = sorted({os.path.realpath(sysconfig.get_path(key)) for key in ("purelib", "platlib")})
        files = [file for root in roots for file in _walk(Path(root), PACKAGE_SUFFIXES)]
    else:
        files = [file for path in config.paths for file in _expand(path, config.obtain)]
        files = list({os.path.realpath(file.path): file for file in files}.values())
    if not files:
        raise DataError(f"data.source={config.source}: no readable file found; point data.source elsewhere")
    return files


def listing(config: DataConfig) -> list[tuple[str, int, int]]:
    """(name, bytes, modification time) of each file: two equal listings are taken for the same text.

    The modification time is 0 for installed packages, which change by being replaced, not edited.
    """
    entries = []
    for file in list_files(config):
        stat = file.path.stat()
        entries.append((file.name, stat.st_size, stat.st_mtime_ns if config.source == "files" else 0))
    return entries


def _walk(root: Path, suffixes: tuple[str, ...]) -> list[SourceFile]:
    """Files below `root` with one of `suffixes`, sorted, without tests and without what pip wrote itself."""
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [
            name for name in subfolders if name not in _SKIPPED_FOLDERS and not name.endswith(_SKIPPED_ENDINGS)
        ]
        inside = Path(folder).relative_to(root).as_posix()
        prefix = "" if inside == "." else f"{inside}/"
        for name in names:
            # os.path, not pathlib: this runs at each start, over tens of thousands of files.
            path = os.path.join(folder, name)
            if name.endswith(suffixes) and not name.startswith(_SKIPPED_PREFIX) and os.path.isfile(path):
                files.append(SourceFile(Path(path), prefix + name))
    return sorted(files, key=lambda file: file.name)


def _expand(pattern: str, obtain: str | None) -> list[SourceFile]:
    """The files that one entry of `data.paths` (a file, a folder or a glob) stands for."""
    path = Path(pattern).expanduser()
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in FILE_SUFFIXES and p.is_file())
        if not files:
            raise DataError(f"data.paths: no {', '.join(FILE_SUFFIXES)} file in folder {path}; name another")
        return [SourceFile(p, p.relative_to(path).as_posix()) for p in files]
    matches = [path] if path.is_file() else [Path(p) for p in sorted(glob.glob(str(path), recursive=True))]
    matches = [match for match in matches if match.is_file()]
    if not matches:
        remedy = f"make it with: {obtain}" if obtain else "give an existing file, folder or glob"
        raise DataError(f"data.paths: {pattern} does not exist; {remedy}")
    for match in matches:
        if match.suffix not in FILE_SUFFIXES:
            raise DataError(f"data.paths: cannot read {match}; expected one of {', '.join(FILE_SUFFIXES)}")
    return [SourceFile(match, match.name) for match in matches]


def read_file(file: SourceFile, column: str, strict: bool = True, after: int = 0) -> Iterator[tuple[int, Document]]:
    """The documents of one file with their numbers, which count from 1: lines, rows, or the one text.

    Args:
        strict: Refuse a text file that is not UTF-8; otherwise it is skipped with a line in the log.
        after: Leave out the documents up to this number.

    Raises:
        DataError: The file cannot be read as what its name says it is.
    """
    try:
        if file.path.suffix == ".jsonl":
            yield from _read_jsonl(file, column, after)
        elif file.path.suffix == ".parquet":
            yield from _read_parquet(file, column, after)
        elif after < 1:
            yield from _read_text(file, strict)
    except OSError as error:
        raise DataError(f"cannot read {file.path}: {error}; restore it or leave it out") from error


def text_of(value: object, where: str, column: str) -> str:
    """The text of a row; a null is an empty document, which is skipped later.

    Raises:
        DataError: The row holds something else, or half a surrogate pair, which JSON can spell and UTF-8 cannot.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{where}: {column!r} holds {type(value).__name__}, not text; set data.text_column")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = f"U+{ord(value[error.start]):04X}"
        raise DataError(
            f"{where}: {column!r} holds the lone surrogate {half} at character {error.start}; replace it or leave the "
            "row out"
        ) from error
    return value


def _read_text(file: SourceFile, strict: bool) -> Iterator[tuple[int, Document]]:
    try:
        # Bytes, not text mode: newlines stay as they are, so that tokens decode to the file.
        yield 1, Document(file.name, file.path.read_bytes().decode("utf-8"))
    except UnicodeDecodeError as error:
        if strict:
            raise DataError(f"{file.path}: not UTF-8 at byte {error.start}; convert it to UTF-8") from error
        logger.info("skipped %s: not UTF-8", file.name)


def _read_jsonl(file: SourceFile, column: str, after: int) -> Iterator[tuple[int, Document]]:
    with file.path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if number <= after or not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{file.path}, line {number}: not JSON ({error}); correct it") from error
            if not isinstance(row, dict) or column not in row:
                keys = sorted(row) if isinstance(row, dict) else type(row).__name__
                raise DataError(f"{file.path}, line {number}: no {column!r} in {keys}; set data.text_column")
            yield number, Document(f"{file.name}:{number}", text_of(row[column], f"{file.path}, line {number}", column))


def _read_parquet(file: SourceFile, column: str, after: int) -> Iterator[tuple[int, Document]]:
    try:
        table = pq.ParquetFile(file.path)
    except ValueError as error:  # pyarrow's ArrowInvalid
        raise DataError(f"{file.path}: not a parquet file ({error}); restore it") from error
    with table:
        if column not in table.schema_arrow.names:
            raise DataError(f"{file.path}: no column {column!r} in {table.schema_arrow.names}; set data.text_column")
        number = 0
        wanted: list[int] = []
        for index in range(table.num_row_groups):
            rows = table.metadata.row_group(index).num_rows
            if not wanted and number + rows <= after:
                number += rows
            else:
                wanted.append(index)
        for batch in table.iter_batches(batch_size=_PARQUET_ROWS, row_groups=wanted, columns=[column]):
            for value in batch.column(0):
                number += 1
                if number > after:
                    where = f"{file.path}, row {number}"
                    try:
                        text = text_of(value.as_py(), where, column)
                    except UnicodeDecodeError as error:
                        raise DataError(
                            f"{where}: {column!r} is not UTF-8 at byte {error.start}; convert it or leave the row out"
                        ) from error
                    yield number, Document(f"{file.name}:{number}", text)

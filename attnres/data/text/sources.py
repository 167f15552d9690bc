"""Where the text comes from: iterators of documents, and a cheap listing that tells when they changed."""

import csv
import glob
import io
import json
import logging
import lzma
import os
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from attnres.data.config import DataConfig
from attnres.errors import DataError

logger = logging.getLogger(__name__)

FILE_SUFFIXES = (".txt", ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
# Behind any of them but the last.
COMPRESSIONS = (".bz2", ".gz", ".lz4", ".xz", ".zst")
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
        files = [file for path in config.paths for file in _expand(path, config)]
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


def suffix_of(name: str) -> str:
    """What a file holds, by its name: `a.JSONL.zst` holds `.jsonl`; of a compressed parquet file, `.parquet.zst`."""
    stem, suffix = os.path.splitext(name.lower())
    inner = os.path.splitext(stem)[1] if suffix in COMPRESSIONS else ""
    return inner + suffix if inner == ".parquet" else inner or suffix


def _expand(pattern: str, config: DataConfig) -> list[SourceFile]:
    """The files that one entry of `data.paths` (a file, a folder or a glob) stands for."""
    path = Path(pattern).expanduser()
    if path.is_dir():
        suffixes = config.suffixes or FILE_SUFFIXES
        files = [file for file in _in_folder(path, config) if suffix_of(file.name) in suffixes]
        if not files:
            raise DataError(
                f"data.paths: no {', '.join(suffixes)} file in folder {path}; name another, or the suffixes of its "
                "text in data.suffixes"
            )
        return files
    matches = [path] if path.is_file() else [Path(p) for p in sorted(glob.glob(str(path), recursive=True))]
    matches = [match for match in matches if match.is_file()]
    if not matches:
        remedy = f"make it with: {config.obtain}" if config.obtain else "give an existing file, folder or glob"
        raise DataError(f"data.paths: {pattern} does not exist; {remedy}")
    for match in matches:
        if suffix_of(match.name) not in (*FILE_SUFFIXES, *config.suffixes):
            raise DataError(
                f"data.paths: cannot read {match}; expected one of {', '.join(FILE_SUFFIXES)}; if it is text, name its "
                "suffix in data.suffixes"
            )
    return [SourceFile(match, match.name) for match in matches]


def _in_folder(folder: Path, config: DataConfig) -> list[SourceFile]:
    """All files but hidden ones, those in hidden folders (a notebook's checkpoints), and the corpora made of others."""
    made, root = os.path.realpath(os.path.expanduser(config.cache_dir)), os.path.realpath(folder)
    skipped = f"/{os.path.relpath(made, root)}/"
    files = [SourceFile(path, path.relative_to(folder).as_posix()) for path in sorted(folder.rglob("*"))]
    shown = (file for file in files if "/." not in f"/{file.name}" and not f"/{file.name}".startswith(skipped))
    return [file for file in shown if file.path.is_file()]


def log_left_out(config: DataConfig) -> None:
    """One line that says which files of the folders of `data.paths` are not read."""
    suffixes = config.suffixes or FILE_SUFFIXES
    folders = [path for path in (Path(given).expanduser() for given in config.paths) if path.is_dir()]
    names = [
        file.name for folder in folders for file in _in_folder(folder, config) if suffix_of(file.name) not in suffixes
    ]
    if names:
        kinds = Counter(suffix_of(name) or "without a suffix" for name in names)
        counts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(8))
        more = ", ..." if len(names) > 3 else ""
        logger.warning(
            "data.paths: %d files are left out: %s (%s%s); text among them is read by data.suffixes",
            len(names), counts, ", ".join(names[:3]), more,
        )  # fmt: skip


def read_file(file: SourceFile, column: str, strict: bool = True, after: int = 0) -> Iterator[tuple[int, Document]]:
    """The documents of one file with their numbers, which count from 1: lines, rows, or the one text.

    Args:
        strict: Refuse a text file that is not UTF-8; otherwise it is skipped with a line in the log.
        after: Leave out the documents up to this number.

    Raises:
        DataError: The file cannot be read as what its name says it is.
    """
    suffix = suffix_of(file.name)
    try:
        if suffix == ".parquet":
            yield from _read_parquet(file, column, after)
        elif suffix in (".jsonl", ".ndjson", ".json"):
            yield from _read_rows(file, _json_rows(file, suffix), column, after)
        elif suffix in (".csv", ".tsv"):
            yield from _read_rows(file, _csv_rows(file, "\t" if suffix == ".tsv" else ","), column, after)
        elif after < 1:
            yield from _read_text(file, strict)
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise DataError(f"cannot read {file.path}: {error}; restore it or leave it out") from error


def _open(path: Path) -> IO[bytes]:
    """The bytes of a file, decompressed as its name says."""
    if path.suffix.lower() == ".xz":
        return lzma.open(path)
    compression = {".bz2": "bz2", ".gz": "gzip", ".lz4": "lz4", ".zst": "zstd"}.get(path.suffix.lower())
    return io.BufferedReader(pa.input_stream(path, compression)) if compression else path.open("rb")


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
        with _open(file.path) as opened:
            yield 1, Document(file.name, opened.read().decode("utf-8"))
    except UnicodeDecodeError as error:
        if strict:
            raise DataError(f"{file.path}: not UTF-8 at byte {error.start}; convert it to UTF-8") from error
        logger.info("skipped %s: not UTF-8", file.name)


def _read_rows(
    file: SourceFile, rows: Iterator[tuple[int, str, Any]], column: str, after: int
) -> Iterator[tuple[int, Document]]:
    """The documents of rows, each with its number and what that counts: lines or rows."""
    for number, unit, row in rows:
        if number <= after:
            continue
        where = f"{file.path}, {unit} {number}"
        if not isinstance(row, dict) or column not in row:
            keys = sorted(map(str, row)) if isinstance(row, dict) else type(row).__name__
            remedy = "set data.text_column, or leave such files out by data.suffixes"
            raise DataError(f"{where}: no {column!r} in {keys}; {remedy}")
        yield number, Document(f"{file.name}:{number}", text_of(row[column], where, column))


def _json_rows(file: SourceFile, suffix: str) -> Iterator[tuple[int, str, Any]]:
    """An object per line; a `.json` file may also be one array of them, or a single one, over any number of lines."""
    if suffix == ".json" and (values := _whole_json(file.path)) is not None:
        yield from ((number, "row", value) for number, value in enumerate(values, start=1))
        return
    with _open(file.path) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield number, "line", json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise DataError(f"{file.path}, line {number}: not JSON ({error}); correct it") from error


def _whole_json(path: Path) -> list[Any] | None:
    """The rows of a file that is one JSON value; None where its first line is an object, as in a file of lines."""
    with _open(path) as lines:
        first = next((line for line in lines if line.strip()), b"{}")
        try:
            if isinstance(json.loads(first), dict):
                return None
        except (ValueError, RecursionError):
            pass
    try:
        with _open(path) as whole:
            value = json.load(whole)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: neither one JSON value nor one in each line ({error}); correct it") from error
    return value if isinstance(value, list) else [value]


def _csv_rows(file: SourceFile, delimiter: str) -> Iterator[tuple[int, str, Any]]:
    # A field is a document here, of any length.
    csv.field_size_limit(2**31 - 1)
    number = 0
    try:
        with io.TextIOWrapper(_open(file.path), encoding="utf-8-sig", newline="") as lines:
            for number, row in enumerate(csv.DictReader(lines, delimiter=delimiter, strict=True), start=1):
                yield number, "row", row
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{file.path}: unreadable behind row {number} ({error}); correct it") from error


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

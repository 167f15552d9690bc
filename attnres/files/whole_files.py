"""Files that appear whole or not at all, JSON that is read within bounds, locks, and the error of a full disk."""

import errno
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from attnres import faults
from attnres.errors import ConfigError, StorageError

# No JSON file of ours comes near either; parsed, a file is some ten times as large.
MOST_BYTES = 32 * 2**20
MOST_DEPTH = 64
# A string, up to the end of the file where it is not closed, or a bracket.
_NESTING = re.compile(rb'"(?:[^"\\]|\\.)*+(?:"|\\?\Z)|[\[\]{}]', re.DOTALL)
# The system refuses to write: no space, no permission, a name that is taken by something else.
REFUSALS = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG}
    | {errno.ENOTDIR, errno.EISDIR, errno.EEXIST}
)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file that appears under its final name whole, or not at all.

    Yields:
        The temporary path beside it to write to. It is flushed and renamed at the end, and removed after an error.
    """
    temporary = path.with_name(f".tmp-{path.name}")
    # What a killed process left, or a link that somebody put there: neither is written through.
    temporary.unlink(missing_ok=True)
    temporary.open("xb").close()
    try:
        yield temporary
        fsync_path(temporary)
        faults.point("write")
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    fsync_path(path.parent)


def write_text(path: Path, text: str) -> None:
    """Writes a small file whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


def write_json(path: Path, value: Any) -> None:
    """`write_text` of indented JSON; NaN is refused."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")


def fsync_path(path: Path) -> None:
    """Flushes a file or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path, most_bytes: int = MOST_BYTES) -> Any:
    """The JSON value in a regular file that may come from anywhere: bounded in size and depth before it is parsed.

    Raises:
        OSError: it cannot be read.
        ValueError: it is larger than `most_bytes`, nested deeper than `MOST_DEPTH`, or not JSON in UTF-8.
    """
    size = path.stat().st_size
    # Size and type first: a device or a pipe has no end.
    if not path.is_file():
        raise ValueError("not a regular file")
    if size > most_bytes:
        raise ValueError(f"{size:,} bytes, at most {most_bytes:,} are read")
    raw = path.read_bytes()
    depth = 0
    for token in _NESTING.finditer(raw):
        sign = token[0]
        depth += (sign in (b"[", b"{")) - (sign in (b"]", b"}"))
        if depth > MOST_DEPTH:
            raise ValueError(f"nested deeper than {MOST_DEPTH}")
    # As UTF-8 and nothing else: in it alone a byte that looks like a quote or a bracket is one.
    return json.loads(raw.decode())


def read_object(path: Path, most_bytes: int = MOST_BYTES) -> dict[str, Any]:
    """The JSON object in a file: `read_json`, and ValueError for anything else than an object."""
    value = read_json(path, most_bytes)
    if not isinstance(value, dict):
        raise ValueError("expected a JSON object")
    return value


@contextmanager
def locked(path: Path, busy: str, timeout: float = 0.0) -> Iterator[None]:
    """Holds a lock file. The lock is the kernel's, so that it dies with its holder.

    Args:
        busy: what the error says where another process holds it.
        timeout: seconds to wait for that process; -1 waits for ever.

    Raises:
        ConfigError: another process holds it.
        OSError: the lock file cannot be made.
    """
    lock = FileLock(path)
    try:
        lock.acquire(timeout=timeout)
    except Timeout:
        raise ConfigError(busy) from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def storage_errors(place: Path, remedy: str, every: bool = False) -> Iterator[None]:
    """Names the place where the system refuses to write; other errors of the operating system pass.

    Args:
        every: whether all of them are refusals, because nothing else is done here than to write; a network's file
            system has more kinds than `REFUSALS`.

    Raises:
        StorageError: `{place}: {what the system said, and of which file}; {remedy}`.
    """
    try:
        yield
    except OSError as error:
        if not every and error.errno not in REFUSALS:
            raise
        elsewhere = error.filename is not None and str(error.filename) != str(place)
        message = f"{error.strerror or error}{f' ({error.filename})' if elsewhere else ''}"
        raise StorageError(f"{place}: {message}; {remedy}") from error

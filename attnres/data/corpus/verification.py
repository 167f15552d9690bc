"""Damage is found before a corpus is used, whatever its size.

Corpora below `VERIFY_BYTES` are read in full whenever they are opened, in well under a second. A larger one is read in
full once, by several threads with a progress line, and a stamp in its folder remembers size, inode, modification and
change time of every file: until one of these changes, later runs compare them and read nothing. What that cannot see is
a disk that returns other bytes for a file that nobody wrote to; deleting the stamp has everything read again.
"""

import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from attnres.data.corpus.shards import check_file
from attnres.files.whole_files import locked, read_object, write_text

logger = logging.getLogger(__name__)

VERIFY_BYTES = 256 * 1024**2
STAMP = "verified.json"
_THREADS = 4
_PROGRESS_SECONDS = 10.0


def verify_files(folder: Path, files: Mapping[str, Mapping[str, Any]], remedy: str) -> None:
    """Checks every file of a corpus against its digest.

    Any number of processes may call this at once: one reads, the others wait for its stamp. In a folder that cannot
    be written, each reads for itself.

    Args:
        files: Digests by name, as the manifest stores them.

    Raises:
        DataError: A file is missing or damaged; the message names it and the bytes.
    """
    total = sum(entry["bytes"] for entry in files.values())
    small = total < VERIFY_BYTES
    for name, entry in files.items():
        check_file(folder / name, entry, contents=small, remedy=remedy)
    if small or _read_stamp(folder) == _stamp(folder, files):
        return
    with _one_reader(folder):
        if _read_stamp(folder) == _stamp(folder, files):
            return
        # Taken before reading: a file that is changed meanwhile no longer matches it.
        stamp = _stamp(folder, files)
        _read_all(folder, files, total, remedy)
        _write_stamp(folder, stamp)


def _read_all(folder: Path, files: Mapping[str, Mapping[str, Any]], total: int, remedy: str) -> None:
    logger.info("verifying %s: %.1f GB; later runs only look whether a file was changed", folder, total / 1e9)
    done, logged = 0, time.monotonic()
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as threads:
        checks = [threads.submit(check_file, folder / name, entry, True, remedy) for name, entry in files.items()]
        try:
            for check, entry in zip(checks, files.values(), strict=True):
                check.result()
                done += entry["bytes"]
                if time.monotonic() - logged > _PROGRESS_SECONDS:
                    logged = time.monotonic()
                    logger.info("verifying %s: %.1f of %.1f GB", folder, done / 1e9, total / 1e9)
        finally:
            threads.shutdown(cancel_futures=True)


def _stamp(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> dict[str, list[Any]]:
    stamp: dict[str, list[Any]] = {}
    for name, entry in files.items():
        stat = (folder / name).stat()
        stamp[name] = [entry["sha256"], stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]
    return stamp


def _read_stamp(folder: Path) -> dict[str, Any] | None:
    try:
        return read_object(folder / STAMP)
    except (OSError, ValueError):
        return None


def _write_stamp(folder: Path, stamp: dict[str, list[Any]]) -> None:
    try:
        write_text(folder / STAMP, json.dumps(stamp))
    except OSError as error:
        logger.warning("%s: %s; every run will read the whole corpus again", folder, error.strerror)


@contextmanager
def _one_reader(folder: Path) -> Iterator[None]:
    with ExitStack() as stack:
        # In a folder that cannot be written, each reads for itself.
        with suppress(OSError):
            stack.enter_context(locked(folder / f".{STAMP}.lock", busy="", timeout=-1))
        yield

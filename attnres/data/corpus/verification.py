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
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from attnres.data.corpus.shards import check_file

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
        folder: Folder of the corpus.
        files: Digests by name, as the manifest stores them.
        remedy: What to do about damage.

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
    done, told = 0, time.monotonic()
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as threads:
        checks = [threads.submit(check_file, folder / name, entry, True, remedy) for name, entry in files.items()]
        try:
            for check, entry in zip(checks, files.values(), strict=True):
                check.result()
                done += entry["bytes"]
                if time.monotonic() - told > _PROGRESS_SECONDS:
                    told = time.monotonic()
                    logger.info("verifying %s: %.1f of %.1f GB", folder, done / 1e9, total / 1e9)
        finally:
            threads.shutdown(cancel_futures=True)


def _stamp(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> dict[str, list[Any]]:
    found = {}
    for name, entry in files.items():
        stat = (folder / name).stat()
        found[name] = [entry["sha256"], stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]
    return found


def _read_stamp(folder: Path) -> Any:
    try:
        return json.loads((folder / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _write_stamp(folder: Path, stamp: dict[str, list[Any]]) -> None:
    temporary = folder / f".{STAMP}.{os.getpid()}"
    try:
        temporary.write_text(json.dumps(stamp), encoding="utf-8")
        os.replace(temporary, folder / STAMP)
    except OSError as error:
        logger.warning("%s: %s; every run will read the whole corpus again", folder, error.strerror)


@contextmanager
def _one_reader(folder: Path) -> Iterator[None]:
    lock = FileLock(folder / f".{STAMP}.lock")
    try:
        lock.acquire()
    except OSError:  # a folder that cannot be written
        yield
        return
    try:
        yield
    finally:
        lock.release()

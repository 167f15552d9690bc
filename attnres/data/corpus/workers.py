"""Processes that sign and tokenise a chunk each, and a line in the log now and then."""

import logging
import multiprocessing
import os
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from attnres.data.corpus.chunks import Chunk, Encoder, write_chunk
from attnres.errors import Stopped
from attnres.processes.signals import ignore_stop_signals

logger = logging.getLogger(__name__)

_PROGRESS_SECONDS = 10.0


class Progress:
    """Counts of what is committed.

    Args:
        metas: `meta.json` of the chunks that earlier sessions wrote.
    """

    def __init__(self, metas: Iterable[dict[str, Any]]) -> None:
        self.documents, self.bytes, self.tokens, self.cpu_seconds = 0, 0, 0, 0.0
        self._began = self._logged = time.monotonic()
        self._count(metas)
        self._tokens_before = self.tokens

    def add(self, metas: Iterable[dict[str, Any]]) -> None:
        """Counts further chunks."""
        self._count(metas)
        now = time.monotonic()
        if now - self._logged > _PROGRESS_SECONDS:
            self._logged = now
            logger.info(
                "%s documents, %.0f MB, %s tokens; %s tokens/s, %s tokens/s per core",
                f"{self.documents:,}", self.bytes / 1e6, f"{self.tokens:,}",
                f"{(self.tokens - self._tokens_before) / (now - self._began):,.0f}",
                f"{self.tokens / self.cpu_seconds:,.0f}",
            )  # fmt: skip

    def _count(self, metas: Iterable[dict[str, Any]]) -> None:
        for meta in metas:
            self.documents += meta["documents"]
            self.bytes += meta["bytes"]
            self.tokens += meta["tokens"]
            self.cpu_seconds += meta["cpu_seconds"]


class Pool:
    """Workers that write chunks.

    Args:
        executor: Its processes share this process's memory.
        folder: The unfinished corpus, for the message.
    """

    def __init__(self, executor: ProcessPoolExecutor, workers: int, folder: Path) -> None:
        self._executor, self._workers, self._folder = executor, workers, folder

    def write(self, chunks: Iterable[Chunk], progress: Progress) -> None:
        """Has every chunk written.

        Raises:
            Stopped: A worker was killed.
        """
        pending: set[Future[dict[str, Any]]] = set()
        try:
            for chunk in chunks:
                while len(pending) > self._workers:
                    done, pending = wait(pending, return_when=FIRST_COMPLETED)
                    progress.add(future.result() for future in done)
                pending.add(self._executor.submit(_work, chunk))
            progress.add(future.result() for future in wait(pending).done)
        except BrokenProcessPool as error:
            raise Stopped(
                f"{self._folder}: a worker was killed (out of memory?); the same command goes on, --workers "
                f"{max(1, self._workers // 2)} needs less memory"
            ) from error


@contextmanager
def started(workers: int, folder: Path, encoder: Encoder) -> Iterator[Pool]:
    """Workers that write chunks into `chunks` below a folder.

    They start before anything is read, so that they share this process's memory and none of what it reads.
    """
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers, context, _start, (folder / "chunks", encoder)) as executor:
        executor.submit(os.getpid).result()
        yield Pool(executor, workers, folder)


# What a worker process needs for every chunk; set once in it, by `_start`.
_worker: tuple[Path, Encoder] | None = None


def _start(chunks: Path, encoder: Encoder) -> None:
    global _worker
    _worker = (chunks, encoder)
    ignore_stop_signals()
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    """Ends this worker when the process that started it is gone: it would wait for work forever, holding the lock."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _work(chunk: Chunk) -> dict[str, Any]:
    assert _worker is not None
    chunks, encoder = _worker
    meta = write_chunk(chunks, chunk, encoder)
    return {key: meta[key] for key in ("documents", "bytes", "tokens", "cpu_seconds")}

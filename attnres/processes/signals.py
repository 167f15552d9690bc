"""One probe per folder, and its end on a signal."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from filelock import FileLock, Timeout

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopSignals:
    """Turns SIGTERM, SIGINT and SIGUSR1 into a flag that is read between cells.

    A context manager: previous handlers come back at the end. A second SIGINT interrupts at once.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def asked(self) -> bool:
        return self.received is not None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received is not None:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
        # os.write is safe in a handler; a logging lock may be held by the code that was interrupted.
        os.write(2, f"\n{self.received.name}: finishing the current cell, then stopping\n".encode())


@contextmanager
def lock(folder: Path) -> Iterator[bool]:
    """Takes the lock of a folder, which the kernel releases if its holder dies.

    Yields:
        Whether it was free.
    """
    held = FileLock(folder / ".lock")
    try:
        held.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        held.release()

"""The signals that stop a process: a flag that is read between two steps, or the end at once if nothing can be saved.

One class for every command. A scheduler sends SIGTERM or SIGUSR1, a person SIGINT.
"""

import os
import signal
import threading
from types import FrameType
from typing import Any

from attnres.errors import Stopped
from attnres.processes.launcher import launched_by_lightning

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_active: "list[StopSignals]" = []


class StopSignals:
    """Turns the stop signals into a flag; a context manager, after which the previous handlers are back.

    While `can_save` is False there is nothing to save, and a signal ends the process at once with exit code 75. A
    thread does that, because a handler of Python has to wait until torch returns, and a rank that waits for another
    one to arrive does not. A second SIGINT interrupts at once. A process forked from this one dies of a signal as if
    it had no handler.

    Args:
        promise: what is told when a signal comes and there is something to save.
        nothing_saved: what is told when there is not.
        can_save: where it begins.
    """

    def __init__(self, promise: str, nothing_saved: str, can_save: bool = False) -> None:
        self.received: signal.Signals | None = None
        self.can_save = can_save
        self._promise, self._nothing_saved = promise, nothing_saved
        self._previous: dict[signal.Signals, Any] = {}
        self._previous_descriptor = -1
        self._write = -1

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            read, self._write = os.pipe()
            os.set_blocking(self._write, False)
            self._previous = {number: signal.getsignal(number) for number in STOP_SIGNALS}
            self._previous_descriptor = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
            for number in STOP_SIGNALS:
                signal.signal(number, self._handle)
            threading.Thread(target=self._watch, args=(read,), daemon=True, name="stop-signals").start()
            _active.append(self)
        return self

    def __exit__(self, *exception: object) -> None:
        if self in _active:
            _active.remove(self)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._write != -1:
            signal.set_wakeup_fd(self._previous_descriptor)
            os.close(self._write)
            self._write = -1

    def asked(self) -> bool:
        """Whether a signal has come."""
        return self.received is not None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received is not None:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
        if self.can_save:
            # os.write is safe in a handler; a logging lock may be held by the code that was interrupted.
            os.write(2, f"\n{self.received.name}: {self._promise}\n".encode())

    def _watch(self, read: int) -> None:
        while number := os.read(read, 1):
            if number[0] in STOP_SIGNALS and not self.can_save:
                os.write(2, f"\nerror: {signal.Signals(number[0]).name} {self._nothing_saved}\n".encode())
                if not launched_by_lightning():
                    os._exit(Stopped.code)
                # Its end ends this process too, see `bound_to_launcher`.
                os.kill(os.getppid(), number[0])
        os.close(read)


def ignore_stop_signals(*_: object) -> None:
    """For worker processes: a scheduler and Ctrl-C signal the whole group, and workers end with their parent."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _forked() -> None:
    if _active:
        # The pipe is shared with the parent, whose thread would take this process's signals for its own.
        signal.set_wakeup_fd(-1)
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        _active.clear()


os.register_at_fork(after_in_child=_forked)

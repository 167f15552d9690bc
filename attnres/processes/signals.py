"""What happens on SIGTERM, SIGUSR1 (both from schedulers) and SIGINT (from a person).

* Training: the signal sets a flag. `attnres.training.step_duties` reads it after the optimizer step, saves a checkpoint
  and ends the run. Before the first step there is nothing to save, and the process ends at once.
* A probe: the signal sets a flag. `attnres.probe` reads it between two cells and keeps the finished ones.
* Every other command ends at once; none of them leaves a file half written.

The exit code is 75 each time, and the same command goes on.
"""

import os
import signal
import threading
from types import FrameType
from typing import Any

from attnres.errors import Stopped

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_active: "list[StopSignals]" = []


class StopSignals:
    """A context manager that turns the stop signals into a flag; at its end the previous handlers are back.

    While `can_save` is False there is nothing to save, and a signal ends the process at once with exit code 75. A
    thread does that: a handler of Python runs only when torch returns, and torch does not return in a rank that waits
    for another. A second SIGINT interrupts at once. A process that is forked from this one has no handlers: a signal
    ends it, or is ignored there if there is something to save here.

    Args:
        promise: the message at a signal while there is something to save.
        nothing_saved: the message at a signal while there is not, behind the signal's name.
        can_save: the value at the start; whoever begins to save sets the attribute.
        launcher: process id of Lightning's launcher, for a rank that is bound to it (`bound_to_launcher`): instead of
            ending, such a rank hands the signal on, and ends with the launcher.
    """

    def __init__(self, promise: str, nothing_saved: str, can_save: bool = False, launcher: int | None = None) -> None:
        self.received: signal.Signals | None = None
        self.can_save = can_save
        self._promise, self._nothing_saved, self._launcher = promise, nothing_saved, launcher
        self._previous: dict[signal.Signals, Any] = {}
        self._previous_descriptor = -1
        self._write = -1

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            read, self._write = os.pipe()
            os.set_blocking(self._write, False)
            self._previous = {number: signal.getsignal(number) for number in STOP_SIGNALS}
            threading.Thread(target=self._watch, args=(read,), daemon=True, name="stop-signals").start()
            # The watch of an outer command goes on until the handlers here are in place: no signal is lost between.
            if _active:
                self._take_handlers()
            self._previous_descriptor = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
            if not _active:
                self._take_handlers()
            _active.append(self)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._write == -1:
            return
        _active.remove(self)
        if _active:
            signal.set_wakeup_fd(self._previous_descriptor)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if not _active:
            signal.set_wakeup_fd(self._previous_descriptor)
        os.close(self._write)
        self._write = -1

    def _take_handlers(self) -> None:
        for number in STOP_SIGNALS:
            signal.signal(number, self._handle)

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
                if self._launcher is None or os.getppid() != self._launcher:
                    os._exit(Stopped.code)
                os.kill(self._launcher, number[0])
        os.close(read)


def ignore_stop_signals(*_: object) -> None:
    """For worker processes: a scheduler and Ctrl-C signal the whole group, and workers end with their parent."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _forked() -> None:
    if _active:
        # The pipe is shared with the parent, whose thread would take this process's signals for its own.
        signal.set_wakeup_fd(-1)
        # A worker that is forked while there is something to save must not die before its parent has saved.
        disposition = signal.SIG_IGN if any(active.can_save for active in _active) else signal.SIG_DFL
        for number in STOP_SIGNALS:
            signal.signal(number, disposition)
        _active.clear()


os.register_at_fork(after_in_child=_forked)

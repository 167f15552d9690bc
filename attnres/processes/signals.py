"""What happens on SIGTERM, SIGUSR1, SIGUSR2 (from schedulers) and SIGINT (from a person).

* Training: the signal sets a flag. `attnres.training.step_duties` reads it after the optimizer step, saves a checkpoint
  and ends the run. Before the first step there is nothing to save, and the process ends at once.
* A probe: the signal sets a flag. `attnres.probe` reads it between two cells and keeps the finished ones.
* Every other command ends at once; none of them leaves a file half written.

The exit code is 75 each time, and the same command goes on.

A handler that another library had installed decides instead, once everything is saved. Submitit's ends the job at
SIGUSR2 and puts it back into the queue; at SIGTERM it returns, and the work goes on.
"""

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from attnres.errors import Stopped, one_line


def _stop_signals() -> tuple[signal.Signals, ...]:
    """Those that everybody sends, and the one that submitit was told to use."""
    usual = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
    chosen = getattr(signal, f"SIG{os.environ.get('SUBMITIT_PREEMPT_SIGNAL', '')}", None)
    return usual if chosen in (None, *usual) else (*usual, chosen)


STOP_SIGNALS = _stop_signals()
_active: "list[StopSignals]" = []


class StopSignals:
    """A context manager that turns the stop signals into a flag; at its end the previous handlers are back.

    Whoever reads the flag saves, then calls `hand_on`, and ends where `ends` says so.

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
        self._received: list[signal.Signals] = []
        self.can_save = can_save
        self._promise, self._nothing_saved, self._launcher = promise, nothing_saved, launcher
        self._previous: dict[signal.Signals, Any] = {}
        self._of_others: dict[signal.Signals, Callable[..., object]] = {}
        self._previous_descriptor = -1
        self._write = -1

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            read, self._write = os.pipe()
            os.set_blocking(self._write, False)
            self._previous = {number: signal.getsignal(number) for number in STOP_SIGNALS}
            self._of_others = _active[-1]._of_others if _active else _of_others(self._previous)
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

    @property
    def name(self) -> str:
        """Of the last signal that came, or empty."""
        return self._received[-1].name if self._received else ""

    def asked(self) -> bool:
        """Whether a signal has come, and it is time to save."""
        return bool(self._received)

    def ends(self) -> bool:
        """Whether a signal has come that ends the command, as opposed to one that a handler of others waits for."""
        return any(number not in self._of_others for number in self._received)

    def hand_on(self) -> None:
        """Calls the handlers that others had for the signals that came; everything is saved now.

        Raises:
            Stopped: such a handler failed, as submitit's does where a job may not go back into the queue.
        """
        for number in [received for received in self._received if received in self._of_others]:
            self._received.remove(number)
            try:
                self._of_others[number](number, None)
            except Exception as error:
                raise Stopped(
                    f"stopped by {number.name}, everything is saved ({one_line(error)}); the same command resumes"
                ) from error

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._received:
            raise KeyboardInterrupt
        received = signal.Signals(number)
        if received in self._of_others and not self.can_save:
            self._of_others[received](number, frame)
            return
        self._received.append(received)
        if self.can_save:
            then = "handing the signal on" if received in self._of_others else "stopping"
            # os.write is safe in a handler; a logging lock may be held by the code that was interrupted.
            os.write(2, f"\n{received.name}: {self._promise}, then {then}\n".encode())

    def _watch(self, read: int) -> None:
        while number := os.read(read, 1):
            if number[0] in STOP_SIGNALS and number[0] not in self._of_others and not self.can_save:
                os.write(2, f"\nerror: {signal.Signals(number[0]).name} {self._nothing_saved}\n".encode())
                if self._launcher is None or os.getppid() != self._launcher:
                    os._exit(Stopped.code)
                os.kill(self._launcher, number[0])
        os.close(read)


def _of_others(handlers: dict[signal.Signals, Any]) -> dict[signal.Signals, Callable[..., object]]:
    """The handlers that are functions, without Python's own for SIGINT."""
    return {n: own for n, own in handlers.items() if callable(own) and own is not signal.default_int_handler}


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

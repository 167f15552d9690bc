"""The process that started this one, where that is Lightning's launcher: ranks end with it, and not before it."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from attnres.errors import RankLost, Stopped

POLL_SECONDS = 0.5
# Below the period of five seconds in which Lightning's launcher kills everything because one of its children ended.
_LAUNCHER_SECONDS = 20.0
# For a rank that ends at the same time as the one that started it.
_GRACE_SECONDS = 2.0


def launched_by_lightning() -> bool:
    """Whether this is a further rank that Lightning started itself, as opposed to torchrun or a scheduler."""
    outside = ("TORCHELASTIC_RUN_ID", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK")
    return int(os.environ.get("LOCAL_RANK") or 0) > 0 and not any(name in os.environ for name in outside)


def lost_message(gone: list[int]) -> str:
    """The message about ranks that died: their numbers, and that the same command resumes."""
    which = f"rank {', '.join(map(str, gone))} died" if gone else "another rank died or cannot be reached"
    return f"{which}; the same command resumes from the last checkpoint"


def end_as_lost(gone: list[int], code: int = RankLost.code) -> None:
    """Ends this process from a thread, saying which ranks are gone."""
    os.write(2, f"\nerror: {lost_message(gone)}\n".encode())
    os._exit(code)


@contextmanager
def bound_to_launcher() -> Iterator[int | None]:
    """Makes a rank that Lightning's launcher started end when the launcher ends, neither later nor earlier.

    Not later: a launcher that is killed leaves its children running. Not earlier: once a child ends with a code other
    than 0, the launcher kills everything, itself included, which would hide the exit code of a stopped run.
    """
    if not launched_by_lightning():
        yield None
        return
    parent = os.getppid()
    ending = threading.Event()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(POLL_SECONDS)
        if ending.wait(_GRACE_SECONDS):
            # The main thread is ending by itself and has yet to say why.
            time.sleep(_GRACE_SECONDS)
            os._exit(Stopped.code)
        # Nobody reads this exit code: the launcher had one of its own to report.
        end_as_lost([0], Stopped.code)

    threading.Thread(target=watch, daemon=True, name="launcher").start()
    try:
        yield parent
        ending.set()
    except Exception:
        ending.set()
        deadline = time.monotonic() + _LAUNCHER_SECONDS
        while os.getppid() == parent and time.monotonic() < deadline:
            time.sleep(0.1)
        raise

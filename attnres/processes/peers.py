"""The other processes of one training run: noticing that one is gone, naming it, and ending rather than waiting.

A rank that dies leaves the others in a collective. Gloo notices the closed connection, NCCL waits for its timeout, and
a launcher may wait for all of them. Each rank therefore watches the processes of the others on its host.
"""

import os
import socket
import threading
import time
from datetime import timedelta

import torch.distributed as dist

from attnres.errors import RankLost
from attnres.processes.launcher import POLL_SECONDS, end_as_lost, lost_message

# Of a collective. A rank may wait this long for the first one to write a large checkpoint.
GROUP_TIMEOUT = timedelta(minutes=10)
# How long the main thread gets to fail by itself, with a better message, before the watch ends the process.
_GRACE_SECONDS = 5.0


class Peers:
    """The other ranks of a run and whether they are alive; only those on this host can be looked at."""

    def __init__(self) -> None:
        self._processes: dict[int, tuple[int, str]] = {}
        self._over = threading.Event()

    def meet(self) -> None:
        """Exchanges process ids; every rank must call it. Starts the watch."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return
        # A process id means something only in its own namespace.
        place = f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}" if os.path.isdir("/proc/self/ns") else ""
        mine = (place, os.getpid(), _born(os.getpid()))
        everyone: list[tuple[str, int, str]] = [("", 0, "")] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        self._processes = {
            rank: (pid, born)
            for rank, (where, pid, born) in enumerate(everyone)
            if place and where == place and rank != dist.get_rank() and born and _born(pid) == born
        }
        threading.Thread(target=self._watch, daemon=True, name="ranks").start()

    def leave(self) -> None:
        """Ends the watch: from here on, a rank whose process ends has finished its work."""
        self._over.set()

    def gone(self) -> list[int]:
        """Ranks on this host whose process is no more."""
        return [rank for rank, (pid, born) in self._processes.items() if _born(pid) != born]

    def lost(self, reason: str) -> RankLost:
        """The error for a collective that failed because of another rank."""
        deadline = time.monotonic() + 2
        while not (gone := self.gone()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return RankLost(f"{lost_message(gone)}: {reason}")

    def _watch(self) -> None:
        while not self._over.wait(POLL_SECONDS):
            if self.gone() and not self._over.wait(_GRACE_SECONDS):
                end_as_lost(self.gone())


def _born(pid: int) -> str:
    """Start time of a process in the kernel's ticks, or "" if it is no more (or a zombie)."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as stat:
            fields = stat.read().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def is_connection_loss(error: BaseException) -> bool:
    """Whether an error of torch means that another rank went away."""
    if isinstance(error, dist.DistBackendError | dist.DistNetworkError):
        return True
    text = str(error).lower()
    signs = ("closed by peer", "connection reset", "broken pipe", "timed out", "connection refused", "gloo")
    return isinstance(error, RuntimeError) and any(sign in text for sign in signs)

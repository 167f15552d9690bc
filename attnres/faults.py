"""Named points at which the fault suite (`tests/faults`) makes a process die or fail; otherwise nothing happens there.

`ATTNRES_FAULT=POINT[@N][#RANK]:ACTION` strikes at the N-th pass of a point (default 1), on one rank or on every rank.
It can do nothing but what `ACTIONS` lists, all of which end or disturb this process alone.
"""

import errno
import os
import re
import signal
import sys
from dataclasses import dataclass

VARIABLE = "ATTNRES_FAULT"
POINTS = frozenset(
    {
        # training, in the order in which a run passes them
        *("train.setup", "corpus.read", "corpus.shards", "corpus.rename", "train.data", "train.model", "train.fit"),
        *("train.batch", "train.step", "train.validation", "train.complete"),
        *("save.begin", "save.tensors", "save.export", "save.manifest", "save.rename", "save.replace"),
        *("save.published", "prune.rename", "prune.remove"),
        # any small file that is written whole or not at all
        "write",
        *("probe.located", "probe.checked", "probe.registered", "probe.cell", "probe.tables", "report.write"),
    }
)
_SIGNALS = {
    **{"kill": signal.SIGKILL, "term": signal.SIGTERM, "int": signal.SIGINT},
    **{"usr1": signal.SIGUSR1, "usr2": signal.SIGUSR2},
}
_ERRORS = {"enospc": errno.ENOSPC, "eio": errno.EIO}
# `full` lets the next file that grows past this fail; `cut` kills its writer there, in the middle of the write.
_FILE_BYTES = 16 * 2**10
ACTIONS = frozenset({*_SIGNALS, *_ERRORS, "oom", "full", "cut"})


@dataclass
class Fault:
    """One strike that is to come: at the `passes`-th pass of `point`, on `rank` (None: on any)."""

    point: str
    passes: int
    rank: int | None
    action: str

    @classmethod
    def parse(cls, text: str | None) -> "Fault | None":
        """Reads `POINT[@N][#RANK]:ACTION`.

        Raises:
            ValueError: it is something else.
        """
        if not text:
            return None
        match = re.fullmatch(r"([a-z.]+)(?:@(\d+))?(?:#(\d+))?:([a-z0-9]+)", text)
        if not match or match[1] not in POINTS or match[4] not in ACTIONS:
            raise ValueError(f"{VARIABLE}={text!r}: expected POINT[@N][#RANK]:ACTION, see attnres/faults.py")
        return cls(match[1], int(match[2] or 1), int(match[3]) if match[3] else None, match[4])


_armed: Fault | None = Fault.parse(os.environ.get(VARIABLE))


def arm(text: str | None) -> None:
    """Sets or clears the fault of this process: for a suite that forks processes which have loaded this module."""
    global _armed
    _armed = Fault.parse(text)


def point(name: str) -> None:
    """Marks a place in the code. One comparison unless a fault is armed."""
    if _armed is not None:
        _pass(_armed, name)


def _pass(fault: Fault, name: str) -> None:
    assert name in POINTS, name
    if name != fault.point or (fault.rank is not None and fault.rank != _rank()):
        return
    fault.passes -= 1
    if fault.passes == 0:
        _strike(fault.action)


def _rank() -> int:
    return int(os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or 0)


def _strike(action: str) -> None:
    if action in _SIGNALS:
        os.kill(os.getpid(), _SIGNALS[action])
    elif action in _ERRORS:
        raise OSError(_ERRORS[action], os.strerror(_ERRORS[action]))
    elif action == "oom":
        # The points that it strikes at come after torch is loaded; this module must not load it.
        raise sys.modules["torch"].OutOfMemoryError("injected: tried to allocate more than the device has")
    else:
        import resource

        if action == "cut":
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (_FILE_BYTES, _FILE_BYTES))

"""Hostile files against every entry point: nothing of theirs runs, nothing is written outside the run folder.

What is put where stands in `hostile_checkpoints.py` and `hostile_inputs.py`; here it is played and judged. No input is
worse than this project's own guards need: just over one of its bounds, or a call of `tests.faults.canary`.
"""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnres.files.hashes import sha256_of
from attnres.files.whole_files import MOST_BYTES, MOST_DEPTH
from tests.faults import canary
from tests.faults.runner import Outcome
from tests.faults.world import Base

ROW = "malicious input"
MOST_MIB = 1500
SECRET = "hf_QwErTyUiOpAsDfGhJkLzXcVb"


@dataclass(frozen=True)
class Case:
    """One payload at one entry point.

    Attributes:
        entry: which door.
        payload: what comes in.
        prepare: puts it there; returns the command and the arguments beyond the usual ones.
        codes: exit codes that are right; 0 where the payload is to be ignored.
        short: part of the short form.
    """

    entry: str
    payload: str
    prepare: Callable[["Trap"], tuple[str, list[str]]]
    codes: tuple[int, ...]
    short: bool = False
    environment: tuple[tuple[str, str], ...] = ()


# What a probe does after its checks is not what is tested here.
PROBE_WORDS = ("probe.families=embedding", "probe.sublayers=mlp", "probe.schedules=[uniform]")


# Puts a payload somewhere; returns the command and the arguments beyond the usual ones.
Prepare = Callable[["Trap"], tuple[str, list[str]]]
# Changes a folder: of a checkpoint, a probe or a corpus.
Change = Callable[["Trap", Path], None]


class Trap:
    """A world with a run from elsewhere, a canary, and a folder that nobody may touch."""

    def __init__(self, base: Base) -> None:
        self.world = base.world("hostile", "probed")
        self.folder = self.world.folder
        self.canary = self.folder / "canary"
        self.outside = self.folder / "outside"
        self.outside.mkdir()
        (self.outside / "precious.txt").write_text("precious")
        self.evil = {
            kind: Path(shutil.copytree(next(self.world.runs.glob(f"{kind}-*")), self.folder / "evil" / kind))
            for kind in ("attnres", "vanilla")
        }

    def step(self, kind: str = "attnres") -> Path:
        return self.evil[kind] / "checkpoints" / "step_00000006"

    def seal(self, kind: str = "attnres") -> None:
        """A manifest that agrees with the files, as whoever changed them would write it."""
        step = self.step(kind)
        files = {
            p.relative_to(step).as_posix(): {"sha256": sha256_of(p), "bytes": p.stat().st_size}
            for p in sorted(step.rglob("*"))
            if p.is_file() and p.name != "manifest.json"
        }
        (step / "manifest.json").write_text(json.dumps({"files": files}, indent=2, sort_keys=True) + "\n")

    def snapshot(self) -> dict[str, Any]:
        """Everything outside the folders that a command may write to."""
        mine = (self.world.runs, self.folder / "logs", self.world.cache)
        return {
            str(path): path.lstat().st_mtime_ns if path.is_file() else 0
            for path in self.folder.rglob("*")
            if not any(path.is_relative_to(place) for place in mine)
        }


def play(base: Base, case: Case) -> Outcome:
    """Runs one case and looks for what it may have done."""
    began = time.monotonic()
    trap = Trap(base)
    command, more = case.prepare(trap)
    before = trap.snapshot()
    only = more if command == "report" else None
    environment = {"CANARY": str(trap.canary)} | dict(case.environment)
    child = trap.world.run(command, *([] if only else more), only=only, environment=environment)
    output, wrong = child.output.strip(), []
    if child.code not in case.codes:
        wrong.append(f"exit code {child.code}: {output[-700:]}")
    if trap.canary.exists():
        wrong.append("the payload ran")
    changed = sorted(set(trap.snapshot().items()) ^ set(before.items()))
    if changed:
        wrong.append(f"touched outside the run folder: {changed[:3]}")
    if (trap.outside / "precious.txt").read_text() != "precious":
        wrong.append("wrote through a link")
    if "Traceback" in output or (child.code > 0 and sum(w.startswith("error: ") for w in output.splitlines()) != 1):
        wrong.append(f"not one line: {output[-700:]}")
    if child.peak_mib > MOST_MIB:
        wrong.append(f"{child.peak_mib:.0f} MiB of memory")
    if SECRET in output:
        wrong.append("a secret in the log")
    for path in trap.world.runs.rglob("*"):
        # Of a report, what was drawn: the secret is in the summary that it was drawn from.
        if command == "report" and not path.name.startswith("report."):
            continue
        if path.is_file() and not path.is_symlink() and SECRET.encode() in path.read_bytes():
            wrong.append(f"a secret in {path.relative_to(trap.world.runs)}")
            break
    if command == "report" and child.code == 0:
        html = (Path(more[0]) / "report.html").read_text()
        wrong += [f"not escaped: {text}" for text in ("<script>alert", "<img src=x", '="javascript:') if text in html]
    expected = f"exit {' or '.join(map(str, case.codes))}, nothing ran"
    found = f"exit {child.code}, {'nothing ran' if not wrong else 'see summary.json'}"
    name = f"{case.payload} -> {case.entry}"
    return Outcome("hostile", ROW, name, expected, found, "; ".join(wrong), time.monotonic() - began)


class Code:
    """Calls the canary where a pickle of it is loaded."""

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return canary.touch, ()


def deep() -> str:
    """One level more than is read."""
    return '{"a":' + "[" * MOST_DEPTH + "]" * MOST_DEPTH + "}"


def huge() -> str:
    """A little more than is read."""
    return '{"a": "' + "x" * MOST_BYTES + '"}'


def write(name: str, content: Callable[[], str]) -> Change:
    return lambda trap, folder: (folder / name).write_text(content()) and None


def replace_by_link(path: Path, trap: Trap) -> None:
    """A link out of the folder in place of a file or folder, or where none was."""
    if path.is_dir():
        shutil.rmtree(path)
        path.symlink_to(trap.outside)
    else:
        path.unlink(missing_ok=True)
        path.symlink_to(trap.outside / "precious.txt")

"""Random SIGKILLs: after each, every final name is readable and the newest is the newest; at the end, the same bits."""

import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

from tests.faults.runner import Outcome
from tests.faults.world import ROOT, Base, Child, World, check, readable, same_probe, same_run

ROW = "kill -9 at any phase"


def training(base: Base, number: int, seed: int) -> Outcome:
    """Kills training runs at random moments, again and again until each has ended, and compares its bits."""
    return _kill(base, number, seed, "train", lambda w: w.start("train"), same_run, "empty")


def probing(base: Base, number: int, seed: int) -> Outcome:
    """The same for probes."""
    return _kill(base, number, seed, "probe", lambda w: w.start("probe"), same_probe, "trained")


def real(base: Base, number: int, seed: int) -> Outcome:
    """Kills `python train.py`, imports included."""

    def start(world: World) -> Child:
        log = world.folder / "logs" / "real.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as stream:
            process = subprocess.Popen(
                [sys.executable, "train.py", *world.arguments("train")],
                cwd=ROOT, stdout=stream, stderr=stream, start_new_session=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )  # fmt: skip
        return Child(process.pid, log)

    return _kill(base, number, seed, "train.py", start, same_run, "empty")


def _kill(
    base: Base,
    number: int,
    seed: int,
    name: str,
    start: Callable[[World], Child],
    same: Callable[[World, World], None],
    state: str,
) -> Outcome:
    began, draw = time.monotonic(), random.Random(f"{seed} {name}")
    world, wrong = base.world(f"kills-{name}", state), []
    kills = ended = 0
    # How long an undisturbed run takes is learned on the way: other work on the machine changes it.
    whole = start(world)
    code = whole.wait(600)
    length = whole.seconds
    if code != 0:
        wrong.append(f"undisturbed, exit code {code}: {whole.output[-500:]}")
    world = base.world(f"kills-{name}", state)
    while kills < number and not wrong:
        child, deadline = start(world), draw.uniform(0, length)
        while child.poll() is None and time.monotonic() - child.began < deadline:
            time.sleep(0.002)
        if child.poll() is None:
            child.kill()
            child.wait()
            kills += 1
        elif child.code != 0:
            wrong.append(f"after {kills} kills, exit code {child.code}: {child.output[-800:]}")
        if message := check(partial(readable, world), world):
            wrong.append(f"after {kills} kills: {message}")
        if child.code == 0:
            if message := check(partial(same, world, base.whole), world):
                wrong.append(f"after {kills} kills: {message}")
            ended += 1
            length = 0.5 * length + 0.5 * max(child.seconds, 0.2 * length)
            shutil.rmtree(world.runs)
            world = base.world(f"kills-{name}", state)
    if not wrong and (ended == 0 or kills):
        last = start(world)
        if last.wait(600) != 0:
            wrong.append(f"at the end, exit code {last.code}: {last.output[-800:]}")
        elif message := check(partial(same, world, base.whole), world):
            wrong.append(f"at the end: {message}")
        ended += 1
    what = f"{number} random SIGKILLs of {name}"
    found = f"{kills} kills, {ended} runs ended with the same bits" if not wrong else f"{kills} kills"
    return Outcome("kills", ROW, what, "same bits", found, "; ".join(wrong), time.monotonic() - began)

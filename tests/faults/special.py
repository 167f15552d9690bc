"""Faults that need more than one process, a server, or a file system of their own."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from attnres.files.run_folder import list_steps
from attnres.training import checkpoint
from tests.faults.runner import Outcome
from tests.faults.world import ROOT, STEPS, Base, Child, World, check, readable, same_run

_DDP = ("trainer.devices=2", "trainer.strategy=ddp", "trainer.micro_batch_size=1", "trainer.global_batch_size=4")
# What is promised for all processes of a run, from the fault on.
MOST_SECONDS = 30.0
# Older than this, a process is a rank.
_SETTLED_SECONDS = 2.0


def _outcome(name: str, row: str, expected: str, found: str, wrong: list[str], began: float) -> Outcome:
    return Outcome("special", row, name, expected, found, "; ".join(wrong), time.monotonic() - began)


def _until(condition: Callable[[], bool], seconds: float = 120.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def two_at_once(base: Base, name: str) -> Outcome:
    """A second process in a folder exits 2; the first goes on; a dead one's lock holds nobody up."""
    began, wrong = time.monotonic(), []
    command = name.rpartition(" ")[2]
    world = base.world("two", "half" if command == "training" else "trained")
    what = "train" if command == "training" else "probe"
    first = world.start(what)
    ready = "steps " if what == "train" else "writing to "
    if not _until(lambda: ready in first.output or first.poll() is not None):
        wrong.append(f"the first does not start: {first.output[-500:]}")
    first.kill(signal.SIGSTOP)
    second = world.run(what)
    first.kill(signal.SIGCONT)
    if second.code != 2 or "in use" not in second.output:
        wrong.append(f"the second: exit code {second.code}: {second.output[-500:]}")
    if first.wait() != 0:
        wrong.append(f"the first: exit code {first.code}: {first.output[-500:]}")
    return _outcome(name, "two runs in one folder", "2 and 0", f"{second.code} and {first.code}", wrong, began)


def disk_really_full(base: Base, name: str) -> Outcome:
    """A small file system of memory instead of a hook; without the check of free space, so that a write fails."""
    began, wrong = time.monotonic(), []
    world = base.world("full", "half")
    used = sum(p.stat().st_size for p in world.runs.rglob("*") if p.is_file())
    mounted = world.folder / "mounted"
    mounted.mkdir()
    size = f"size={used + 500_000}"
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(mounted)], capture_output=True, text=True)
    if done.returncode:
        return _outcome(name, "disk full", "6, then same run", "skipped: no right to mount", [], began)
    try:
        subprocess.run(["cp", "-r", f"{world.runs}/.", str(mounted)], check=True)
        world.runs = mounted

        def unchecked() -> None:
            checkpoint._check_space = lambda folder, needed: None  # type: ignore[assignment]

        child = world.run("train", before=unchecked)
        if child.code != 6 or "Traceback" in child.output:
            wrong.append(f"exit code {child.code}: {child.output[-600:]}")
        if tuple(list_steps(world.trained)) != (2, 4):
            wrong.append(f"steps {list(list_steps(world.trained))}")
        if message := check(lambda: readable(world), world):
            wrong.append(message)
        checked = world.run("train")
        if checked.code != 6 or "MiB needed" not in checked.output:
            wrong.append(f"with the check, exit code {checked.code}: {checked.output[-600:]}")
        subprocess.run(["mount", "-o", "remount,size=100M", str(mounted)], check=True)

        def roomy() -> None:
            checkpoint._MARGIN_BYTES = 2**20

        again = world.run("train", before=roomy)
        if again.code != 0:
            wrong.append(f"with space, exit code {again.code}: {again.output[-600:]}")
        elif message := check(lambda: same_run(world, base.whole), world):
            wrong.append(message)
    finally:
        subprocess.run(["umount", "-l", str(mounted)], check=False)
    return _outcome(name, "disk full", "6, then same run", f"{child.code}, then {again.code}", wrong, began)


def wandb_down(base: Base, name: str) -> Outcome:
    """A server that takes connections and never answers; compared with logging offline from the start."""
    began, wrong, seconds = time.monotonic(), [], {}
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(16)
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        environment = {"WANDB_BASE_URL": url, "WANDB_API_KEY": "0" * 40, "no_proxy": "127.0.0.1"}
        for mode in ("offline", "online"):
            world = base.world("wandb")
            child = world.run("train", f"logger.wandb={mode}", environment=environment)
            seconds[mode] = child.seconds
            if child.code != 0:
                wrong.append(f"{mode}: exit code {child.code}: {child.output[-600:]}")
            elif message := check(lambda world=world: same_run(world, base.whole), world):
                wrong.append(message)
    added = seconds["online"] - seconds["offline"]
    if added >= 5:
        wrong.append(f"{added:.1f} s added")
    return _outcome(name, "W&B unreachable", "0, under 5 s added", f"0, {added:.1f} s added", wrong, began)


def _ranks(world: World, fault: str | None) -> list[Child]:
    """Two ranks as torchrun would start them, without its own watch over them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def as_rank(rank: int) -> Callable[[], None]:
        def act() -> None:
            from lightning.pytorch.utilities.rank_zero import rank_zero_only

            # Lightning reads it on import, which this process did long before it had a rank.
            rank_zero_only.rank = rank

        return act

    shared = {"TORCHELASTIC_RUN_ID": "faults", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0",
              "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
    return [
        world.start("train", *_DDP, fault=fault, before=as_rank(rank),
                    environment=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]  # fmt: skip


def two_ranks(base: Base, name: str) -> Outcome:
    """`term` or `kill` to one of two ranks; the name ends with the fault."""
    began, wrong = time.monotonic(), []
    fault = name.rpartition(" ")[2]
    action, rank = fault.rpartition(":")[2], int(fault[fault.index("#") + 1])
    whole = World(base.folder, "whole-ddp")
    if not list(whole.runs.glob("attnres-*/complete.json")):
        codes = [child.wait() for child in _ranks(whole, None)]
        if codes != [0, 0]:
            wrong.append(f"undisturbed: {codes}")
    world = base.world("ranks")
    children = _ranks(world, fault)
    # The strike is noticed by the end of the rank that was struck, or by what it says.
    struck = children[rank]
    _until(lambda: struck.poll() is not None or "SIGTERM" in struck.output, 240)
    strike = time.monotonic()
    codes = [child.wait(MOST_SECONDS) for child in children]
    took = time.monotonic() - strike
    expected = [75, 75] if action == "term" else [-9 if i == rank else 1 for i in range(2)]
    if codes != expected:
        wrong.append(f"codes {codes}: " + " / ".join(c.output[-500:] for c in children))
    if action == "kill" and f"rank {rank} died" not in children[1 - rank].output:
        wrong.append(f"the rank is not named: {children[1 - rank].output[-500:]}")
    if message := check(lambda: readable(world), world):
        wrong.append(message)
    if not wrong:
        again = [child.wait() for child in _ranks(world, None)]
        if again != [0, 0]:
            wrong.append(f"the next run: {again}")
        elif message := check(lambda: same_run(world, whole), world):
            wrong.append(message)
    row = "SIGTERM, SIGINT, SIGUSR1" if action == "term" else "a rank dies"
    found = f"{codes} in {took:.1f} s" + ("" if wrong else ", then the same bits")
    return _outcome(name, row, f"{expected} in under 30 s, then the same bits", found, wrong, began)


def launched(base: Base, name: str) -> Outcome:
    """The real command line under torchrun, or with Lightning's own launcher; looks for orphans by a mark."""
    began, wrong = time.monotonic(), []
    how, _, fault = name.partition(" ")
    action, rank = fault.rpartition(":")[2], int(fault[fault.index("#") + 1])
    world = base.world("launched")
    mark = f"{os.getpid()}-{time.monotonic_ns()}"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
    command = [sys.executable, *(torchrun if how == "torchrun" else []), "train.py", *world.arguments("train"), *_DDP]
    environment = os.environ | {"ATTNRES_FAULT": fault, "FAULTS_MARK": mark, "OMP_NUM_THREADS": "1"}
    log = world.folder / "logs" / "launched.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as stream:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=stream, stderr=stream, env=environment, start_new_session=True
        )
    child = Child(process.pid, log)
    since: dict[int, float] = {}
    settled: set[int] = set()

    def struck() -> bool:
        alive, now = _marked(mark), time.monotonic()
        for pid in alive:
            since.setdefault(pid, now)
        # A process between fork and exec looks like a rank; a rank lives longer.
        ranks = {pid for pid, first in since.items() if now - first > _SETTLED_SECONDS and pid in alive}
        gone = bool(settled - set(alive))
        settled.update(ranks)
        return "SIGTERM: saving" in child.output or gone or child.poll() is not None

    _until(struck, 400)
    strike = time.monotonic()
    ended = _until(lambda: child.poll() is not None and not _marked(mark), MOST_SECONDS)
    took = time.monotonic() - strike
    left = _marked(mark)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    code = child.wait(10)
    if not ended:
        wrong.append(f"{len(left)} processes left after {took:.0f} s")
    # torchrun ends with 1 whatever its ranks end with.
    right = {("torchrun", "term"): (1,), ("torchrun", "kill"): (1,), ("lightning", "term"): (75,)}.get((how, action))
    if right is None:
        right = (-9,) if rank == 0 else (1, -9)
    if code not in right:
        wrong.append(f"exit code {code}: {child.output[-1500:]}")
    if how == "torchrun" and action == "term" and child.output.count("exitcode  : 75") < 1:
        wrong.append(f"no rank ended with 75: {child.output[-1500:]}")
    if action == "kill" and f"rank {rank} died" not in child.output:
        wrong.append(f"the rank is not named: {child.output[-1500:]}")
    if message := check(lambda: readable(world), world):
        wrong.append(message)
    if action == "term" and not list_steps(world.trained):
        wrong.append("nothing was saved")
    row = "SIGTERM, SIGINT, SIGUSR1" if action == "term" else "a rank dies"
    expected = f"{' or '.join(map(str, right))}, no orphan, under 30 s"
    found = f"{code}, {len(left)} orphans, {took:.1f} s"
    return _outcome(name, row, expected, found, wrong, began)


def _marked(mark: str) -> list[int]:
    """Live processes whose environment carries the mark."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                environment = (entry / "environ").read_bytes()
                # Not the git that a run asks for its commit: it comes and goes.
                if b"train.py" not in (entry / "cmdline").read_bytes():
                    continue
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if f"FAULTS_MARK={mark}".encode() in environment and state not in "ZX":
                found.append(int(entry.name))
    return found


# name -> part of the short form, action
ACTIONS: dict[str, tuple[bool, Callable[[Base, str], Outcome]]] = {
    "a second process while training": (True, two_at_once),
    "a second process while probing": (False, two_at_once),
    "a file system that is full": (False, disk_really_full),
    "W&B server that never answers": (False, wandb_down),
    **{f"two ranks, {fault}": (fault == "train.batch@5#1:kill", two_ranks)
       for fault in ("train.batch@5#0:term", "train.batch@5#1:term", "train.batch@5#0:kill", "train.batch@5#1:kill",
                     "train.validation#1:kill", "save.export#0:kill")},
    **{f"{how} {fault}": (False, launched)
       for how in ("torchrun", "lightning")
       for fault in ("train.batch@5#0:term", "train.batch@5#1:term", "train.batch@5#0:kill", "train.batch@5#1:kill")},
}  # fmt: skip

assert STEPS > 5, "the faults above strike before the end"

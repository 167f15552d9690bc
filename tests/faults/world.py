"""A tiny project to break: text, configuration, finished runs, and commands forked from a process that is warmed up.

Importing torch and Lightning costs more than a whole tiny run. The suite imports them once, starts no thread, and forks
a child for every command; the child goes through `attnres.commands.hydra_door` from `sys.argv` to its exit code, as
`train.py` does.
"""

import contextlib
import csv
import json
import logging
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from attnres import faults
from attnres.commands import probe, report, train
from attnres.data import open_corpus
from attnres.files.run_folder import COMPLETE, latest, list_steps, verify
from tests.training.run_comparison import assert_same_run
from tests.training.small_texts import write_texts

ROOT = Path(__file__).parents[2]
STEPS = 6
_TRAIN = (
    "data=files data.vocab_size=300 data.sequence_length=16 data.validation=0.15 data.probe_pilot=0.15 "
    "data.probe_confirm=0.25 model.hidden_size=32 model.intermediate_size=64 model.num_hidden_layers=3 "
    "model.num_attention_heads=2 model.num_key_value_heads=1 model.head_dim=16 optim.warmup_steps=2 "
    f"logger.wandb=disabled trainer.max_steps={STEPS} trainer.global_batch_size=4 trainer.micro_batch_size=2 "
    "trainer.accelerator=cpu trainer.threads=1 trainer.val_every_steps=2 trainer.val_batches=2 "
    "trainer.log_every_steps=1 trainer.routing_every_steps=3 trainer.checkpoint_every_steps=2"
)
_PROBE = (
    "threads=1 device=cpu probe.schedules=[uniform] probe.length=16 probe.documents_pilot=4 "
    "probe.documents_confirm=6 probe.batch_size=4 statistics.sign_flips=999 statistics.bootstrap=100"
)
_TABLES = ("effects.parquet", "mass.parquet", "cells.csv", "contrasts.csv", "routing.csv")


@dataclass
class Child:
    """A command that was started."""

    pid: int
    log: Path
    began: float = field(default_factory=time.monotonic)
    code: int | None = None
    seconds: float = 0.0
    peak_mib: float = 0.0

    def poll(self) -> int | None:
        if self.code is None:
            pid, status, usage = os.wait4(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
                self.seconds = time.monotonic() - self.began
                self.peak_mib = usage.ru_maxrss / 2**10
        return self.code

    def wait(self, seconds: float = 240.0) -> int:
        """Exit code; a child that hangs is killed and gives -999."""
        deadline = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic() > deadline:
                self.kill()
                self.wait()
                self.code = -999
                break
            time.sleep(0.005)
        assert self.code is not None
        return self.code

    def kill(self, number: int = signal.SIGKILL) -> None:
        if self.code is None:
            os.kill(self.pid, number)

    @property
    def output(self) -> str:
        # The child itself makes the file, a moment after it was started.
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""


def fork(action: Callable[[], Any], log: Path, environment: dict[str, str] | None = None) -> Child:
    """Runs `action` in a child in a session of its own, its output in `log`; SystemExit decides its code."""
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return Child(pid, log)
    code = 99
    try:
        os.setsid()
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", buffering=1, closefd=False)
        logging.root.handlers.clear()
        os.environ.update(environment or {})
        action()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class World:
    """A folder with everything that one scenario may break.

    Layout: `text/` and `cache/` are shared by all worlds under one base; `runs/` is this world's own.
    """

    def __init__(self, base: Path, name: str) -> None:
        self.base, self.name = base, name
        self.folder = base / "worlds" / name
        self.runs = self.folder / "runs"
        self.cache = base / "cache"
        self.runs.mkdir(parents=True, exist_ok=True)
        self._started = 0

    def arguments(self, command: str, kind: str = "attnres") -> list[str]:
        if command == "report":
            return [str(self.probed)]
        if command == "probe":
            return [
                *_PROBE.split(),
                f"ckpt={self.runs}/attnres",
                f"baseline={self.runs}/vanilla",
                f"runs_dir={self.runs}",
                f"cache_dir={self.cache}",
            ]
        model = ["model.attnres_num_blocks=2"] if kind == "attnres" else ["model=vanilla_tiny"]
        paths = [f"data.paths=[{self.base}/text]", f"data.cache_dir={self.cache}", f"runs_dir={self.runs}"]
        return [*model, *_TRAIN.split(), *paths, f"name={kind}"]

    def start(
        self,
        command: str,
        *more: str,
        fault: str | None = None,
        environment: dict[str, str] | None = None,
        kind: str = "attnres",
        before: Callable[[], Any] | None = None,
        only: list[str] | None = None,
    ) -> Child:
        """Starts `train`, `probe` or `report` in a child; `only` replaces the usual arguments."""
        arguments = [*(self.arguments(command, kind) if only is None else only), *more]

        def run() -> None:
            os.chdir(ROOT)
            torch.set_num_threads(1)
            faults.arm(fault)
            if before is not None:
                before()
            sys.argv = [f"{command}.py", *arguments]
            if command == "report":
                sys.exit(report.main(arguments))
            {"train": train, "probe": probe}[command].main()

        self._started += 1
        return fork(run, self.folder / "logs" / f"{self._started:03}_{command}.log", environment)

    def run(self, command: str, *more: str, **settings: Any) -> Child:
        child = self.start(command, *more, **settings)
        child.wait()
        return child

    @property
    def trained(self) -> Path:
        (folder,) = self.runs.glob("attnres-*")
        return folder

    @property
    def probed(self) -> Path:
        (folder,) = self.runs.glob("probe_attnres*")
        return folder

    def step(self, number: int) -> Path:
        return self.trained / "checkpoints" / f"step_{number:08d}"


def warm_up() -> None:
    """Loads what the commands load late."""
    from hydra.core.plugins import Plugins
    from matplotlib.figure import Figure

    from attnres.report.figures import plotting

    Plugins.instance()
    plotting.to_svg(Figure())
    with contextlib.suppress(ImportError):
        import pyarrow.dataset  # noqa: F401


class Base:
    """The shared part, and a finished run of everything to copy and to compare with."""

    def __init__(self, folder: Path, documents: int = 60) -> None:
        self.folder = folder
        write_texts(folder / "text", documents)
        self.whole = World(folder, "whole")
        for command, kind in (("train", "attnres"), ("train", "vanilla"), ("probe", "attnres")):
            # One more than a run keeps, so that what goes on from here has something to fall back to and to prune.
            child = self.whole.run(command, *(["trainer.keep_last=3"] if command == "train" else []), kind=kind)
            if child.code != 0:
                why = f"ended with {child.code}: {child.output[-3000:]}"
                raise RuntimeError(f"the undisturbed {command} of {kind} {why}")

    def world(self, name: str, start: str = "empty") -> World:
        """A fresh world: `empty`, `half` (checkpoints 2 and 4, as after a kill), `trained` (both), or `probed`."""
        shutil.rmtree(self.folder / "worlds" / name, ignore_errors=True)
        world = World(self.folder, name)
        wanted = {"empty": [], "half": ["attnres-*"], "trained": ["attnres-*", "vanilla-*"], "probed": ["*"]}[start]
        for pattern in wanted:
            for source in self.whole.runs.glob(pattern):
                shutil.copytree(source, world.runs / source.name, symlinks=True)
        if start == "half":
            (world.trained / COMPLETE).unlink()
            shutil.rmtree(world.step(STEPS))
        return world


def check(action: Callable[[], Any], world: World) -> str:
    """Runs a check in a child, so that this process stays without threads; "" or what is wrong."""
    child = fork(action, world.folder / "logs" / "check.log")
    return "" if child.wait() == 0 else child.output.strip()[-1500:]


def readable(world: World) -> None:
    """Every file under a final name can be read, and what is newest or complete says so truly."""
    for run in world.runs.glob("*-*"):
        if run.name.startswith("probe_"):
            continue
        steps = list_steps(run)
        for path in steps.values():
            verify(path)
        assert latest(run) == (steps[max(steps)] if steps else None), "the newest checkpoint is not the newest"
        if (run / COMPLETE).exists():
            assert json.loads((run / COMPLETE).read_text())["step"] == max(steps)
        if (run / "metrics.csv").exists():
            # The last line may be cut off; it is dropped when the run goes on.
            for row in list(csv.DictReader((run / "metrics.csv").open(newline="")))[:-1]:
                assert row["step"].isdigit()
    for corpus in world.cache.glob("*/manifest.json"):
        if not corpus.parent.name.endswith(".building"):
            open_corpus(corpus.parent)
    for path in world.runs.rglob("*"):
        if path.is_file() and not any(part.startswith((".", "wandb")) for part in path.relative_to(world.runs).parts):
            _read(path)


def _read(path: Path) -> None:
    import pandas as pd

    if path.suffix == ".json":
        json.loads(path.read_text())
    elif path.suffix == ".parquet":
        pd.read_parquet(path)
    elif path.suffix == ".csv" and path.name != "metrics.csv":
        pd.read_csv(path)
    elif path.name == "report.html":
        assert path.read_text().rstrip().endswith("</html>")


def same_run(world: World, whole: World) -> None:
    """The run ended with the bits of the uninterrupted one: losses, weights, optimizer, counters. No litter is left."""
    assert_same_run(world.trained, whole.trained, STEPS)
    litter = [p.name for p in (world.trained / "checkpoints").iterdir() if p.name.startswith(".")]
    assert not litter, f"left behind: {litter}"


def same_probe(world: World, whole: World) -> None:
    """The probe's tables are those of the uninterrupted one."""
    import pandas as pd

    for name in _TABLES:
        read = pd.read_parquet if name.endswith("parquet") else pd.read_csv
        pd.testing.assert_frame_equal(read(world.probed / name), read(whole.probed / name), check_exact=True)
    assert (world.probed / "report.html").read_text().rstrip().endswith("</html>")
    litter = [p.name for p in world.probed.iterdir() if p.name.startswith(".tmp-") or p.name.endswith(".part")]
    assert not litter, f"left behind: {litter}"

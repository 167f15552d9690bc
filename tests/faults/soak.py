"""`python -m tests.faults.soak --minutes 60`: one training and one probe watched for leaks, then preemption in a loop.

A steady training process and a steady probe are sampled once a second for resident memory, open files and threads; the
slope is that of a straight line through the samples after a warm-up of a quarter. Then a run is stopped by a signal and
started again, now and then on a disk that is full, until the time is up; each run that ends is compared, bit by bit,
with one that nobody disturbed.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np

from attnres.files.provenance import git_state
from attnres.files.run_folder import list_steps
from attnres.files.whole_files import write_text
from tests.faults.world import Base, Child, World, check, readable, warm_up
from tests.training.run_comparison import rows

_LONG = ("trainer.log_every_steps=5", "trainer.checkpoint_every_steps=20", "trainer.val_every_steps=20")
_LOOP_STEPS = 150
_WARM_UP = 0.25
_PROBE = ("probe.batch_size=1", "probe.documents_pilot=60", "probe.documents_confirm=400",
          "probe.windows_per_document=8")  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for soak.json and SOAK.md")
    parser.add_argument("--work", type=Path, help="folder to run in; a temporary one by default")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-", dir=arguments.work) as work:
        return _run(arguments, Path(work).resolve())


def _run(arguments: argparse.Namespace, work: Path) -> int:
    warm_up()
    seconds = 60 * arguments.minutes
    base = Base(work / "base", documents=900)
    record: dict[str, Any] = {
        "command": f"python -m tests.faults.soak --minutes {arguments.minutes:g}",
        "git": git_state(),
        "training": _steady(base.world("steady"), "train", 0.35 * seconds, "trainer.max_steps=1000000", *_LONG),
        "probe": _steady(base.world("steady-probe", "trained"), "probe", 0.25 * seconds, *_PROBE),
        "preemption": _preempt(base, 0.4 * seconds, random.Random(arguments.seed)),
    }
    print(json.dumps(record, indent=1), flush=True)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        write_text(arguments.out / "soak.json", json.dumps(record, indent=1) + "\n")
        write_text(arguments.out / "SOAK.md", _table(record))
    return 1 if record["preemption"]["wrong"] else 0


def _steady(world: World, command: str, seconds: float, *more: str) -> dict[str, Any]:
    """Samples one process for a while, then stops it by a signal."""
    child = world.start(command, *more)
    samples, began = [], time.monotonic()
    while child.poll() is None and time.monotonic() - began < seconds:
        if sample := _sample(child):
            samples.append((time.monotonic() - began, *sample, _bytes(world)))
        time.sleep(1.0)
    child.kill(signal.SIGTERM)
    code = child.wait()
    kept = np.array(samples[int(_WARM_UP * len(samples)) :])
    hours = kept[:, 0] / 3600
    found: dict[str, Any] = {
        "exit_code": code,
        "hours": float(hours[-1] - hours[0]),
        "samples": len(kept),
        "rss_mib": [float(kept[0, 1]), float(kept[-1, 1]), float(kept[:, 1].max())],
        "rss_mib_per_hour": float(np.polyfit(hours, kept[:, 1], 1)[0]),
        "open_files": [int(kept[:, 2].min()), int(kept[:, 2].max())],
        "threads": [int(kept[:, 3].min()), int(kept[:, 3].max())],
        "run_folder_bytes": [int(kept[0, 4]), int(kept[-1, 4])],
        "log_bytes_per_hour": child.log.stat().st_size / ((samples[-1][0] - samples[0][0]) / 3600),
    }
    if command == "train":
        lines = rows(world.trained)
        found["steps"] = int(lines[-1]["step"])
        found["metrics_bytes_per_step"] = (world.trained / "metrics.csv").stat().st_size / found["steps"]
    return found


def _sample(child: Child) -> tuple[float, int, int] | None:
    """Resident MiB, open files, threads."""
    place = Path("/proc") / str(child.pid)
    try:
        status = dict(line.split(":", 1) for line in (place / "status").read_text().splitlines())
        return int(status["VmRSS"].split()[0]) / 2**10, len(os.listdir(place / "fd")), int(status["Threads"])
    except (OSError, KeyError):
        return None


def _bytes(world: World) -> int:
    total = 0
    for path in world.runs.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:
            continue
    return total


def _preempt(base: Base, seconds: float, draw: random.Random) -> dict[str, Any]:
    """Stops and starts a run until the time is up."""
    longer = (*_LONG, f"trainer.max_steps={_LOOP_STEPS}")
    whole = World(base.folder, "whole-long")
    reference = whole.run("train", *longer)
    found: dict[str, Any] = {
        "restarts": 0, "killed": 0, "disk_full": 0, "runs_ended": 0, "longest_stop_s": 0.0, "wrong": [],
    }  # fmt: skip
    if reference.code != 0:
        found["wrong"].append(f"undisturbed, exit code {reference.code}: {reference.output[-500:]}")
    world, began = base.world("preempted"), time.monotonic()
    while time.monotonic() - began < seconds and not found["wrong"]:
        what = draw.choices(("term", "kill", "full"), (6, 2, 1))[0]
        # Which of the following saves fails decides the file system; here a limit on the size of a file does.
        child = world.start("train", *longer, fault="save.tensors:full" if what == "full" else None)
        deadline = draw.uniform(0.0, 1.2 * reference.seconds)
        while child.poll() is None and (what == "full" or time.monotonic() - child.began < deadline):
            time.sleep(0.01)
        stopped = time.monotonic()
        if child.poll() is None:
            child.kill(signal.SIGTERM if what == "term" else signal.SIGKILL)
        code = child.wait()
        found["longest_stop_s"] = max(found["longest_stop_s"], time.monotonic() - stopped)
        found["restarts"] += 1
        found["killed"] += code == -9
        found["disk_full"] += code == 6
        if code not in {"term": (0, 75), "kill": (0, -9), "full": (0, 6)}[what]:
            found["wrong"].append(f"{what}: exit code {code}: {child.output[-800:]}")
        elif message := check(lambda world=world: readable(world), world):
            found["wrong"].append(message)
        elif code == 0:
            found["runs_ended"] += 1
            if message := check(lambda world=world: _ends_alike(world, whole), world):
                found["wrong"].append(message)
            shutil.rmtree(world.folder)
            world = base.world("preempted")
    return found


def _ends_alike(world: World, whole: World) -> None:
    import torch

    from tests.training.run_comparison import same

    assert rows(world.trained) == rows(whole.trained), "metrics differ"
    last = max(list_steps(whole.trained))
    states = [torch.load(w.step(last) / "training.ckpt", weights_only=True) for w in (world, whole)]
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "loops"):
        assert same(states[0][key], states[1][key]), f"{key} differs"
    assert len(list_steps(world.trained)) == 2, "more checkpoints than keep_last"


def _table(record: dict[str, Any]) -> str:
    lines = ["# Soak", "", f"Made by `{record['command']}`; all figures in `soak.json`.", "", "| | training | probe |",
             "|---|---|---|"]  # fmt: skip
    training, probe, loop = record["training"], record["probe"], record["preemption"]
    for name, form in (
        ("hours", "{:.2f}"), ("rss_mib", "{}"), ("rss_mib_per_hour", "{:.1f}"), ("open_files", "{}"),
        ("threads", "{}"), ("run_folder_bytes", "{}"), ("log_bytes_per_hour", "{:.0f}"),
    ):  # fmt: skip
        lines.append(f"| {name} | {form.format(training[name])} | {form.format(probe[name])} |")
    lines += ["", f"Steps of the steady run: {training['steps']}; "
              f"{training['metrics_bytes_per_step']:.1f} bytes of metrics.csv a step.", "",
              f"Preemption: {loop['restarts']} restarts ({loop['killed']} by SIGKILL, {loop['disk_full']} on a full "
              f"disk), {loop['runs_ended']} runs ended with the same bits; the longest stop took "
              f"{loop['longest_stop_s']:.1f} s; {len(loop['wrong'])} not as promised."]  # fmt: skip
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())

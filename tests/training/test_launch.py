"""The real command as launchers start it: torchrun, a SLURM job that is preempted, a sweep of jobs."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from attnres.files.run_folder import list_steps

ROOT = Path(__file__).parents[2]
# Of the preempted job.
STEPS = 40


@pytest.fixture
def words(tmp_path: Path, data: dict[str, Any]) -> list[str]:
    """Command-line words that make any experiment tiny, on this machine's processors and in `tmp_path`."""
    return [
        "data=files",
        f"data.paths={data['paths']}".replace("'", ""),
        "data.vocab_size=300",
        "data.sequence_length=16",
        "data.validation=0.15",
        f"data.cache_dir={data['cache_dir']}",
        f"runs_dir={tmp_path}/runs",
        "model.hidden_size=32",
        "model.intermediate_size=48",
        "model.head_dim=8",
        "model.num_attention_heads=2",
        "model.num_key_value_heads=1",
        "trainer.accelerator=cpu",
        "trainer.threads=1",
        "trainer.num_workers=0",
        "trainer.global_batch_size=4",
        "trainer.micro_batch_size=1",
        "trainer.compile=false",
        "trainer.val_batches=1",
        "optim.warmup_steps=1",
        "logger.wandb=disabled",
    ]


def cluster_words(words: list[str], strategy: str, steps: int) -> list[str]:
    """Qwen3-0.6B's 28 layers and 8 blocks at a small width."""
    return [
        "+experiment=attnres_0p6b",
        *words,
        "model.vocab_size=304",
        "trainer.devices=2",
        f"trainer.strategy={strategy}",
        f"trainer.max_steps={steps}",
        "trainer.log_every_steps=1",
    ]


def environment(**more: str) -> dict[str, str]:
    """This process's environment without what a launcher around the tests may have left."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "TORCHELASTIC", "MASTER_"))}
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | more


def end(job: subprocess.Popen[str]) -> None:
    """Leaves nothing of a job behind, whatever happened."""
    with suppress(ProcessLookupError):
        os.killpg(job.pid, signal.SIGKILL)


def only_run(tmp_path: Path) -> Path:
    (folder,) = (path for path in (tmp_path / "runs").iterdir() if path.name != "multirun")
    return folder


@pytest.mark.slow
def test_torchrun_trains_the_cluster_experiment(tmp_path: Path, words: list[str]) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    done = subprocess.run(
        [*launch, *cluster_words(words, "ddp", 2)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((only_run(tmp_path) / "complete.json").read_text())["step"] == 2


# Stands for SLURM's srun: two tasks of this script's arguments, the highest exit code of both.
SRUN = """#!/usr/bin/env bash
trap : USR1 TERM
while [[ $1 == --* ]]; do shift; done
for rank in 0 1; do SLURM_PROCID=$rank SLURM_LOCALID=$rank "$@" & tasks[rank]=$!; done
worst=0
for task in "${tasks[@]}"; do
    while kill -0 "$task" 2>/dev/null; do wait "$task"; code=$?; done
    if [ "$code" -gt "$worst" ]; then worst=$code; fi
done
exit "$worst"
"""
SCONTROL = """#!/usr/bin/env bash
echo "$@" >> "$REQUEUED"
"""


@pytest.mark.slow
def test_slurm_job_that_is_preempted_requeues_itself_and_finishes_in_its_folder(
    tmp_path: Path, words: list[str], request: pytest.FixtureRequest
) -> None:
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    requeued = tmp_path / "requeued"
    job = str(10000 + os.getpid() % 9000)
    slurm = environment(
        PATH=f"{tmp_path}:{os.environ['PATH']}",
        REQUEUED=str(requeued),
        PYTHON=sys.executable,
        SLURM_SUBMIT_DIR=str(ROOT),
        SLURM_JOB_ID=job,
        SLURM_JOB_NAME="attnres",
        SLURM_NTASKS="2",
        SLURM_NTASKS_PER_NODE="2",
        SLURM_NNODES="1",
        SLURM_NODEID="0",
        SLURM_NODELIST="localhost",
        MASTER_ADDR="127.0.0.1",
    )
    # Fewer layers: on a CPU, two ranks spend their time in the messages of each.
    arguments = [*cluster_words(words, "fsdp2", STEPS), "model.num_hidden_layers=4", "model.attnres_num_blocks=2"]
    # The recipe sets it from what SLURM says.
    arguments.remove("trainer.devices=2")

    def submit() -> subprocess.Popen[str]:
        job = subprocess.Popen(
            ["bash", "scripts/train.sbatch", *arguments],
            cwd=ROOT,
            env=slurm,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        request.addfinalizer(lambda: end(job))
        return job

    first = submit()
    deadline = time.monotonic() + 900
    metrics = None
    while first.poll() is None and time.monotonic() < deadline:
        metrics = next((tmp_path / "runs").glob("*/metrics.csv"), None)
        if metrics is not None and len(metrics.read_text().splitlines()) > 2:
            os.killpg(first.pid, signal.SIGUSR1)
            break
        time.sleep(0.05)
    _, output = first.communicate(timeout=900)
    assert first.returncode == 75, output
    assert requeued.read_text() == f"requeue {job}\n"
    folder = only_run(tmp_path)
    assert not (folder / "complete.json").exists()

    second = submit()
    _, output = second.communicate(timeout=900)
    assert second.returncode == 0, output
    assert requeued.read_text() == f"requeue {job}\n"
    assert only_run(tmp_path) == folder
    assert json.loads((folder / "complete.json").read_text())["step"] == STEPS
    assert len((folder / "metrics.csv").read_text().splitlines()) == STEPS + 1


@pytest.mark.slow
def test_submitit_job_whose_time_is_up_saves_before_it_goes_back_into_the_queue(
    tmp_path: Path, words: list[str]
) -> None:
    """SIGUSR2 comes in the second step of each life, which only the first one has."""
    launch = [sys.executable, "train.py", "-m", "hydra/launcher=submitit_local", f"hydra.sweep.dir={tmp_path}/sweep"]
    tiny = [*words, "model.num_hidden_layers=4", "trainer.max_steps=3", "trainer.log_every_steps=1"]
    done = subprocess.run(
        [*launch, *tiny],
        cwd=ROOT,
        env=environment(ATTNRES_FAULT="train.step@2:usr2"),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    folder = only_run(tmp_path)
    assert list(list_steps(folder)) == [2, 3]
    assert json.loads((folder / "complete.json").read_text())["step"] == 3
    (log,) = (tmp_path / "sweep").glob(".submitit/*/*.out")
    assert log.read_text().count("Requeued job") == 1


@pytest.mark.slow
def test_sweep_of_three_jobs_leaves_three_folders(tmp_path: Path, words: list[str]) -> None:
    launch = [sys.executable, "train.py", "-m", "hydra/launcher=submitit_local", f"hydra.sweep.dir={tmp_path}/sweep"]
    tiny = [*words, "trainer.max_steps=2", "model.num_hidden_layers=4"]

    def sweep(seeds: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*launch, *tiny, f"seed={seeds}"], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=900
        )

    done = sweep("0,1,2")
    assert done.returncode == 0, done.stderr
    folders = [path.parent for path in (tmp_path / "runs").glob("*/complete.json")]
    assert len(folders) == 3
    assert {json.loads((f / "provenance.json").read_text())["seeds"]["training"] for f in folders} == {0, 1, 2}
    failed = sweep("-1")
    assert failed.returncode == 2, failed.stderr
    assert "seed: expected 0 <= seed" in failed.stderr

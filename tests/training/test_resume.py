"""A run that was killed anywhere ends with the same bits as one that was not."""

import csv
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
from run_comparison import assert_same_run, rows, state
from submitit.core.submission import process_job
from submitit.core.utils import DelayedSubmission
from submitit.local.local import LOCAL_REQUEUE_RETURN_CODE
from training_runs import (
    KILLED,
    before_micro_batches,
    child_killed_in,
    child_run,
    child_signalled_at,
    run,
    settings,
)
from wandb_segments import segments
from warm_processes import exit_code, in_child

from attnres.errors import Stopped
from attnres.files.run_folder import list_steps, verify


def random_settings(folder: Path, data: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """With dropout, so that random numbers matter."""
    return settings(folder, data, model__attention_dropout=0.2, **changes)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, data: dict[str, Any]) -> dict[int, Path]:
    """Uninterrupted runs, by number of micro-batches in a step."""
    return {
        accumulate: run(
            random_settings(tmp_path_factory.mktemp("whole"), data, trainer__micro_batch_size=4 // accumulate)
        )
        for accumulate in (1, 2)
    }


@pytest.mark.parametrize(
    ("accumulate", "workers"),
    [(1, 0), pytest.param(1, 2, marks=pytest.mark.slow), pytest.param(2, 0, marks=pytest.mark.slow), (2, 2)],
)
def test_train_resumes_bitwise_after_sigkill(
    tmp_path: Path, data: dict[str, Any], whole: dict[int, Path], accumulate: int, workers: int
) -> None:
    plain = random_settings(tmp_path, data, trainer__micro_batch_size=4 // accumulate, trainer__num_workers=workers)
    # In the step after step 3: step 3 itself is lost, with part of step 4.
    killed = in_child(child_signalled_at, plain, signal.SIGKILL, 3, accumulate - 1)
    assert exit_code(killed) == KILLED
    folder = tmp_path / whole[accumulate].name
    assert list(list_steps(folder)) == [2]
    assert exit_code(in_child(child_run, plain)) == 0
    assert_same_run(folder, whole[accumulate], 6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "name", "call", "survives"),
    [
        ("attnres.training.checkpoint", "export_model", 1, []),
        ("attnres.training.checkpoint", "_write_manifest", 2, [2]),
        ("attnres.training.step_duties", "prune", 2, [2, 4]),
    ],
)
@pytest.mark.parametrize("background", [False, True])
def test_train_resumes_bitwise_when_killed_while_saving(
    tmp_path: Path,
    data: dict[str, Any],
    whole: dict[int, Path],
    module: str,
    name: str,
    call: int,
    survives: list[int],
    background: bool,
) -> None:
    plain = random_settings(tmp_path, data, trainer__async_checkpoint=background)
    assert exit_code(in_child(child_killed_in, plain, module, name, call)) == KILLED
    folder = tmp_path / whole[1].name
    assert list(list_steps(folder)) == survives
    for path in list_steps(folder).values():
        verify(path)
    assert exit_code(in_child(child_run, plain)) == 0
    assert_same_run(folder, whole[1], 6)
    assert not [p for p in (folder / "checkpoints").iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
def test_train_stops_with_75_at_a_step_boundary_and_resumes(
    tmp_path: Path, data: dict[str, Any], whole: dict[int, Path], number: int
) -> None:
    plain = random_settings(tmp_path, data, trainer__micro_batch_size=2, trainer__num_workers=2)
    assert exit_code(in_child(child_signalled_at, plain, number, 2, 0)) == Stopped.code
    folder = tmp_path / whole[2].name
    assert list(list_steps(folder)) == [2, 3]
    assert not (folder / "complete.json").exists()
    assert exit_code(in_child(child_run, plain)) == 0
    assert_same_run(folder, whole[2], 6)


def test_wandb_misses_no_step_after_sigkill(tmp_path: Path, data: dict[str, Any], original: Path) -> None:
    """The killed process takes along what W&B has not written yet; the next one goes on from a checkpoint of step 4."""
    plain = settings(tmp_path, data, logger__wandb="offline")
    assert exit_code(in_child(child_signalled_at, plain, signal.SIGKILL, 5, 0)) == KILLED
    assert exit_code(in_child(child_run, plain)) == 0
    folder = tmp_path / original.name
    _, (segment, logged) = segments(folder).items()
    assert [(row["_step"], row["step"]) for row in logged] == [(step, step) for step in range(1, 7)]
    assert [repr(row["loss"]) for row in logged] == [row["loss"] for row in rows(folder)]
    assert [row["step"] for row in logged if "val_loss" in row] == [2, 4, 6]
    with open(folder / "routing.csv", newline="") as stream:
        names, *lines = csv.reader(stream)
    files = {row["step"]: segment / "files" / row["routing.path"] for row in logged if "routing.path" in row}
    assert list(files) == [3, 6]
    for step, file in files.items():
        table = json.loads(file.read_text())
        assert ["step", *table["columns"]] == names
        assert [[str(step), *map(str, row)] for row in table["data"]] == [
            line for line in lines if line[0] == str(step)
        ]


def job(plain: dict[str, Any], signals: dict[int, int]) -> None:
    """Trains, and gets a signal in the step after each of these."""

    def signalled(module: Any, batch: Any) -> None:
        if number := signals.pop(module.trainer.global_step, None):
            os.kill(os.getpid(), number)

    before_micro_batches(pytest.MonkeyPatch(), signalled)
    run(plain)


def life(folder: Path) -> int:
    """Exit code of one life of a job, as submitit's local launcher starts it."""
    environment = {"SUBMITIT_EXECUTOR": "local", "SUBMITIT_LOCAL_JOB_ID": "1"}
    return exit_code(in_child(process_job, str(folder), environment=environment))


@pytest.mark.parametrize(
    ("signals", "saved"),
    [
        ({2: signal.SIGUSR2}, [3]),
        # What SLURM sends to a job that is preempted: submitit ignores the first.
        ({1: signal.SIGTERM, 2: signal.SIGUSR2}, [2, 3]),
    ],
)
def test_submitit_job_saves_before_submitit_takes_the_signal(
    tmp_path: Path, data: dict[str, Any], whole: dict[int, Path], signals: dict[int, int], saved: list[int]
) -> None:
    plain = random_settings(tmp_path, data, trainer__checkpoint_every_steps=100)
    submission = DelayedSubmission(job, plain, signals)
    submission.set_timeout(60, 3)
    submission.dump(tmp_path / "1_submitted.pkl")
    assert life(tmp_path) == LOCAL_REQUEUE_RETURN_CODE
    folder = tmp_path / whole[1].name
    assert list(list_steps(folder)) == saved
    assert life(tmp_path) == 0
    assert_same_run(folder, whole[1], 6)


def test_submitit_job_that_may_not_go_back_into_the_queue_says_that_it_is_saved(
    tmp_path: Path, data: dict[str, Any], whole: dict[int, Path]
) -> None:
    submission = DelayedSubmission(job, random_settings(tmp_path, data), {2: signal.SIGUSR2})
    # Its time is up from the start, and it may not begin again.
    submission.set_timeout(0, 0)
    submission.dump(tmp_path / "1_submitted.pkl")
    assert life(tmp_path) == Stopped.code
    assert list(list_steps(tmp_path / whole[1].name)) == [2, 3]
    kind, message = cloudpickle.loads((tmp_path / "1_0_result.pkl").read_bytes())
    assert kind == "error" and "stopped by SIGUSR2, everything is saved (Job not requeued because" in message


def test_train_resumes_with_other_micro_batches_in_the_same_folder(
    tmp_path: Path, data: dict[str, Any], original: Path
) -> None:
    # Six micro-batches were made by step 3: no multiple of the four that a step takes afterwards.
    folder = run(settings(tmp_path, data, trainer__micro_batch_size=2, trainer__checkpoint_every_steps=3))
    shutil.rmtree(folder / "checkpoints" / "step_00000006")
    assert run(settings(tmp_path, data, trainer__micro_batch_size=1)) == folder
    assert state(folder, 6)["global_step"] == 6
    for ours, theirs in zip(rows(folder), rows(original), strict=True):
        assert float(ours["loss"]) == pytest.approx(float(theirs["loss"]), abs=2e-6)
        assert ours["tokens"] == theirs["tokens"]

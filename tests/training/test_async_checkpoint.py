"""Checkpoints written while training goes on: the same files, and no less careful with them."""

import errno
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from run_comparison import same, state
from training_runs import before_micro_batches, run, settings

from attnres.errors import StorageError
from attnres.files.run_folder import list_steps, verify
from attnres.training import checkpoint as checkpoint_module
from attnres.training.checkpoint import host_copy
from attnres.training.module import CausalLMModule

STEPS = [2, 4, 6]


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """Writing takes longer than several steps; tells for every write in which thread it was and what was there."""
    writes: list[tuple[str, list[str]]] = []
    real = checkpoint_module._save_tensors

    def slowly(value: Any, path: Path) -> None:
        thread = "main" if threading.current_thread() is threading.main_thread() else "other"
        time.sleep(0.5)
        writes.append((thread, sorted(p.name for p in path.parents[1].iterdir() if p.name.startswith("step_"))))
        real(value, path)

    monkeypatch.setattr(checkpoint_module, "_save_tensors", slowly)
    return writes


def files(folder: Path, step: int) -> dict[str, str]:
    """Digests of the exported model's files, but for those that name the command or the folder."""
    manifest = json.loads((folder / "checkpoints" / f"step_{step:08d}" / "manifest.json").read_text())["files"]
    return {n: e["sha256"] for n, e in manifest.items() if n.endswith(("safetensors", "config.json", "tokenizer.json"))}


def test_checkpoints_hold_the_weights_of_their_step(
    tmp_path: Path, data: dict[str, Any], slow: list[tuple[str, list[str]]]
) -> None:
    (tmp_path / "now").mkdir()
    (tmp_path / "later").mkdir()
    now = run(settings(tmp_path / "now", data, trainer__keep_last=3))
    later = run(settings(tmp_path / "later", data, trainer__keep_last=3, trainer__async_checkpoint=True))
    assert [thread for thread, _ in slow] == ["main"] * 3 + ["other", "other", "main"]
    assert later.name == now.name and list(list_steps(later)) == STEPS
    for step in STEPS:
        verify(list_steps(later)[step])
        assert same(state(later, step), state(now, step))
        assert files(later, step) == files(now, step) and "model/model.safetensors" in files(now, step)


def test_an_older_checkpoint_stays_until_the_newer_one_is_there(
    tmp_path: Path, data: dict[str, Any], slow: list[tuple[str, list[str]]]
) -> None:
    folder = run(settings(tmp_path, data, trainer__keep_last=1, trainer__async_checkpoint=True))
    assert [there for _, there in slow] == [[], ["step_00000002"], ["step_00000004"]]
    assert list(list_steps(folder)) == [6]


@pytest.mark.slow
def test_a_write_that_fails_ends_the_run_soon_and_leaves_nothing(
    tmp_path: Path, data: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(value: Any, path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint_module, "_save_tensors", full)
    steps: list[int] = []
    before_micro_batches(monkeypatch, lambda module, batch: steps.append(module.trainer.global_step))
    changes = {"trainer__max_steps": 400, "trainer__async_checkpoint": True, "trainer__val_every_steps": 0}
    with pytest.raises(StorageError, match="No space left"):
        run(settings(tmp_path, data, **(changes | {"trainer__checkpoint_every_steps": 300})) | {"name": "full"})
    # Not first when the next checkpoint is due, or at the end.
    assert 299 < max(steps) < 399
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert not list((folder / "checkpoints").iterdir())


def test_a_run_that_fails_meanwhile_waits_for_its_checkpoint(
    tmp_path: Path, data: dict[str, Any], slow: list[tuple[str, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(module: CausalLMModule, batch: Any) -> None:
        if module.trainer.global_step == 2:
            raise StorageError("something else")

    before_micro_batches(monkeypatch, fail)
    with pytest.raises(StorageError, match="something else"):
        run(settings(tmp_path, data, trainer__async_checkpoint=True))
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert list(list_steps(folder)) == [2]
    verify(list_steps(folder)[2])


def test_host_copy_keeps_ties_and_shares_nothing_with_the_model() -> None:
    weight, view = torch.randn(4, 3), torch.arange(6.0)
    value = {"a": weight, "tied": [weight], "part": view[:3], "rest": view[3:], "loops": {"step": [1]}}
    copy = host_copy(value)
    assert same(copy, value)
    assert copy["a"] is copy["tied"][0]
    before = weight.tolist()
    weight.zero_()
    value["loops"]["step"].append(2)
    assert copy["a"].tolist() == before
    assert copy["loops"] == {"step": [1]}
    assert copy["part"].tolist() == [0, 1, 2] and copy["rest"].tolist() == [3, 4, 5]

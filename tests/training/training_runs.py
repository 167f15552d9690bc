"""Tiny runs for the tests of this folder, in this process or in a child that may be killed."""

import importlib
import os
import signal
import socket
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from warm_processes import exit_code, in_child

from attnres.config import build
from attnres.training.config import TrainConfig
from attnres.training.fit import train
from attnres.training.module import CausalLMModule

KILLED = -signal.SIGKILL


def settings(folder: Path, data: dict[str, Any], kind: str = "attnres", **changes: Any) -> dict[str, Any]:
    """A run of 6 steps of 4 windows; `changes` are dotted keys with `__` for the dot."""
    model: dict[str, Any] = {
        "kind": kind,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "tie_word_embeddings": True,
    }
    if kind == "attnres":
        model["attnres_num_blocks"] = 2
    plain: dict[str, Any] = {
        "name": kind,
        "model": model,
        "runs_dir": str(folder),
        "data": data,
        "optim": {"warmup_steps": 2},
        "logger": {"wandb": "disabled"},
        "trainer": {
            "max_steps": 6,
            "global_batch_size": 4,
            "micro_batch_size": 4,
            "accelerator": "cpu",
            "threads": 1,
            "val_every_steps": 2,
            "val_batches": 2,
            "log_every_steps": 1,
            "routing_every_steps": 3,
            "checkpoint_every_steps": 2,
        },
    }
    for key, value in changes.items():
        *path, name = key.split("__")
        group = plain
        for part in path:
            group = group[part]
        group[name] = value
    return plain


def run(plain: dict[str, Any]) -> Path:
    """Trains in this process."""
    return train(build(TrainConfig, plain), "python train.py")


def fake_wandb(monkeypatch: pytest.MonkeyPatch, **entries: Any) -> None:
    """Puts a module with these entries in the place of wandb; it knows no setting."""
    fake = types.SimpleNamespace(Settings=types.new_class("Settings"), **entries)
    fake.Settings.model_fields = {}
    monkeypatch.setitem(sys.modules, "wandb", fake)


def before_micro_batches(monkeypatch: pytest.MonkeyPatch, action: Callable[[CausalLMModule, Any], None]) -> None:
    """Calls `action` with the module and the batch in front of every micro-batch of training."""
    original = CausalLMModule.training_step

    def training_step(self: CausalLMModule, batch: Any, batch_idx: int) -> Any:
        action(self, batch)
        return original(self, batch, batch_idx)

    monkeypatch.setattr(CausalLMModule, "training_step", training_step)


def child_run(plain: dict[str, Any]) -> None:
    """Trains in a child."""
    run(plain)


def child_signalled_at(plain: dict[str, Any], number: int, step: int, micro: int) -> None:
    """Trains, and gets a signal in front of a micro-batch of the step after `step`.

    So do its data workers, as from a scheduler or Ctrl-C.
    """
    original = CausalLMModule.training_step

    def training_step(self: CausalLMModule, batch: Any, batch_idx: int) -> Any:
        if self.trainer.global_step == step and len(self._micro) == micro:
            os.killpg(0, number)
        return original(self, batch, batch_idx)

    os.setpgrp()
    CausalLMModule.training_step = training_step  # type: ignore[method-assign]
    run(plain)


def child_killed_in(plain: dict[str, Any], module: str, name: str, call: int) -> None:
    """Trains, and is killed in front of the `call`-th call of `module.name`."""
    owner = importlib.import_module(module)
    original = getattr(owner, name)
    calls = 0

    def replacement(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **keywords)

    setattr(owner, name, replacement)
    run(plain)


def two_ranks(target: Callable[..., None], *arguments: Any) -> list[int]:
    """Exit codes of two processes that run `target(*arguments)` as the ranks of one job."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        "TORCHELASTIC_RUN_ID": "test",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    ranks = [
        in_child(target, *arguments, environment=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]
    return [exit_code(process) for process in ranks]


def child_rank(plains: list[dict[str, Any]], killed_at: tuple[int, int] | None = None) -> None:
    """One rank of a distributed job, which trains one run after the other; the rank is in the environment.

    Sample ids go to `ids-<rank>.txt` in the runs folder, a line per micro-batch: optimizer step, then the ids.

    Args:
        killed_at: optimizer step and micro-batch in front of which this process gets SIGKILL.
    """
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    rank = int(os.environ["RANK"])
    # Lightning reads it on import, which the parent of this process did.
    rank_zero_only.rank = rank  # type: ignore[attr-defined]
    original = CausalLMModule.training_step
    for plain in plains:
        with open(Path(plain["runs_dir"]) / f"ids-{rank}.txt", "a") as stream:
            print("start", file=stream)

        def training_step(self: CausalLMModule, batch: Any, batch_idx: int, plain: dict[str, Any] = plain) -> Any:
            if (self.trainer.global_step, len(self._micro)) == killed_at:
                os.kill(os.getpid(), signal.SIGKILL)
            with open(Path(plain["runs_dir"]) / f"ids-{rank}.txt", "a") as stream:
                print(self.trainer.global_step, *batch["sample_ids"].tolist(), file=stream)
            return original(self, batch, batch_idx)

        CausalLMModule.training_step = training_step  # type: ignore[method-assign]
        run(plain)


def sample_ids(runs_dir: Path, ranks: int) -> dict[int, list[int]]:
    """Sample ids of every optimizer step in global order, from what `child_rank` wrote."""
    steps: dict[int, list[list[list[int]]]] = {}
    for rank in range(ranks):
        mine: dict[int, list[list[int]]] = {}
        started = False
        for line in (runs_dir / f"ids-{rank}.txt").read_text().splitlines():
            if line == "start":
                started = True
                continue
            step, *ids = map(int, line.split())
            if started:
                # What an earlier process made of this step and later ones is lost.
                mine = {done: micros for done, micros in mine.items() if done < step}
                started = False
            mine.setdefault(step, []).append(ids)
        for step, micros in mine.items():
            steps.setdefault(step, []).append(micros)
    return {
        step: [i for micro in zip(*by_rank, strict=True) for ids in micro for i in ids]
        for step, by_rank in steps.items()
    }

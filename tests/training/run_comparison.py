"""How two finished runs are compared: bitwise, but for what a clock or a machine decides."""

import csv
from pathlib import Path
from typing import Any

import torch

# What a clock or a machine decides.
UNREPEATABLE = {
    "tokens_per_second",
    "tokens_per_second_per_device",
    "data_wait",
    "eta_seconds",
    "mfu",
    "peak_memory_gib",
}


def rows(folder: Path) -> list[dict[str, str]]:
    """metrics.csv without what a clock decides; losses as they were written, which is `repr`."""
    with open(folder / "metrics.csv", newline="") as stream:
        return [{k: v for k, v in row.items() if k not in UNREPEATABLE} for row in csv.DictReader(stream)]


def state(folder: Path, step: int) -> dict[str, Any]:
    """Lightning's state of a checkpoint."""
    path = folder / "checkpoints" / f"step_{step:08d}" / "training.ckpt"
    return torch.load(path, map_location="cpu", weights_only=True)


def same(a: Any, b: Any) -> bool:
    """Bitwise equality of nested containers of tensors."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def assert_same_run(folder: Path, reference: Path, step: int) -> None:
    """Both runs ended at `step` with the same bits: losses, weights, optimizer, counters."""
    assert rows(folder) == rows(reference), "metrics differ"
    assert [float(row["loss"]).hex() for row in rows(folder)] == [float(r["loss"]).hex() for r in rows(reference)]
    assert len(rows(folder)) == step
    ours, theirs = state(folder, step), state(reference, step)
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "loops", "global_step", "attnres"):
        assert same(ours[key], theirs[key]), f"{key} differs"

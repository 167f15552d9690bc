"""What two runs must have in common to be one run that was stopped in between."""

import csv
from pathlib import Path
from typing import Any

import torch

# What a clock or a machine decides.
UNREPEATABLE = frozenset(
    {"tokens_per_second", "tokens_per_second_per_device", "data_wait", "eta_seconds", "mfu", "peak_memory_gib"}
)


def rows(folder: Path) -> list[dict[str, str]]:
    """metrics.csv without what a clock decides; losses as they were written, which is `repr`."""
    with open(folder / "metrics.csv", newline="") as stream:
        return [{k: v for k, v in row.items() if k not in UNREPEATABLE} for row in csv.DictReader(stream)]


def same(a: Any, b: Any) -> bool:
    """Bitwise equality of nested containers of tensors."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)

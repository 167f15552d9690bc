"""Set before anything imports torch or Triton: one thread a test process, and kernels interpreted without a GPU."""

import os

# Two workers (pytest-xdist) on few cores: more threads than cores spin, and steps get many times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Files of few and long tests. They go first: a worker that gets one last keeps the other waiting.
_LONG = ("test_launch", "test_faults", "test_end_to_end", "test_distributed", "test_modeling")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: _LONG.index(item.path.stem) if item.path.stem in _LONG else len(_LONG))

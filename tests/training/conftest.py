"""One small corpus for all training tests."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

WORDS = ["if", "then", "else", "def", "return", "loop", "sum", "alpha", "beta", "gamma", "delta", "x", "y", "z"]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """`data:` of a configuration over some generated text files."""
    folder: Path = tmp_path_factory.mktemp("text")
    (folder / "text").mkdir()
    draw = random.Random(0)
    for i in range(60):
        words = [draw.choice(WORDS) + str(draw.randrange(20)) for _ in range(120)]
        (folder / "text" / f"{i:02}.txt").write_text(" ".join(words))
    return {
        "source": "files",
        "paths": [str(folder / "text")],
        "vocab_size": 300,
        "sequence_length": 16,
        "validation": 0.15,
        "cache_dir": str(folder / "cache"),
    }

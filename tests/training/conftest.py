"""One small corpus and one finished run for all training tests."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from small_texts import write_texts
from training_runs import run, settings


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """`data:` of a configuration over some generated text files."""
    folder = tmp_path_factory.mktemp("text")
    write_texts(folder / "text")
    return {
        "source": "files",
        "paths": [str(folder / "text")],
        "vocab_size": 300,
        "sequence_length": 16,
        "validation": 0.15,
        "cache_dir": str(folder / "cache"),
    }


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory, data: dict[str, Any]) -> Path:
    """A finished run of `settings(..., data)`, with checkpoints of steps 4 and 6; nobody changes it."""
    return run(settings(tmp_path_factory.mktemp("original"), data))


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy of it to damage, where `settings(tmp_path, data)` finds it."""
    return shutil.copytree(original, tmp_path / original.name)

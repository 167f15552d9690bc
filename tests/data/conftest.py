"""A small corpus of random words, built once for all tests of this folder."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from attnres.data import Corpus, DataConfig, prepare


@pytest.fixture(scope="session")
def random_text() -> Callable[[int, int], str]:
    """Text of so many random words, the same for the same seed."""

    def make(seed: int, words: int) -> str:
        rng = random.Random(seed)
        return " ".join("".join(rng.choices("abcdefghij\n", k=rng.randint(1, 8))) for _ in range(words))

    return make


@pytest.fixture(scope="session")
def texts(random_text) -> list[str]:
    return [random_text(seed, 40 + 3 * seed) for seed in range(120)]


@pytest.fixture(scope="session")
def make_config() -> Callable[..., DataConfig]:
    """Writes texts to `documents.jsonl` in a folder; the configuration of a corpus of them."""

    def make(folder: Path, texts: list[str], **changes: Any) -> DataConfig:
        path = folder / "documents.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        plain: dict[str, Any] = {
            "source": "files",
            "paths": (str(path),),
            "vocab_size": 300,
            "sequence_length": 16,
            "validation": 0.15,
            "cache_dir": str(folder / "cache"),
        }
        return DataConfig(**(plain | changes))

    return make


@pytest.fixture(scope="session")
def config(make_config, texts, tmp_path_factory) -> DataConfig:
    return make_config(tmp_path_factory.mktemp("corpus"), texts)


@pytest.fixture(scope="session")
def corpus(config) -> Corpus:
    return prepare(config)

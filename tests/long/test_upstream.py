"""Transformers' own tests; `TRANSFORMERS` names the source archive of the installed version's git tag."""

import os
from importlib.metadata import version
from pathlib import Path

import pytest
from environments import Environment

pytestmark = pytest.mark.long
ARCHIVE = os.environ.get("TRANSFORMERS")


@pytest.mark.skipif(not ARCHIVE, reason="TRANSFORMERS names no source archive of the git tag; see docs/tests.md")
def test_model_passes_every_test_of_the_library_that_qwen3_passes(plain: Environment, tmp_path: Path) -> None:
    environment = Environment.new(tmp_path, plain.sources, below=plain)
    environment.install(
        f"transformers=={version('transformers')}", "accelerate", "parameterized", "pytest", "pytest-xdist"
    )
    print(environment.python("-m", "tests.upstream", Path(str(ARCHIVE)).resolve()))

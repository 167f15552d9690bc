"""The environment that the long tests begin with."""

import re
import shutil
from pathlib import Path

import pytest
from environments import LEFT_OUT, ROOT, Environment, torch_options


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this repository."""
    return Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("sources") / "attnres", ignore=LEFT_OUT))


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory, sources: Path) -> Environment:
    """The package as `pip install attnres` leaves it, without an extra."""
    environment = Environment.new(tmp_path_factory.mktemp("plain"), sources)
    environment.install(*torch_options())
    # The Triton that belongs to this torch, which a build without CUDA does not name.
    environment.install(*re.findall(r"^triton==[0-9.]+", (ROOT / "requirements.lock").read_text(), re.MULTILINE))
    environment.install(sources)
    return environment

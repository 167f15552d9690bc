"""The environment that the long tests begin with."""

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
    environment.install(sources)
    return environment

"""The suite with every dependency at the floor of its range, and at the newest release inside it."""

import json
import tomllib
from pathlib import Path

import pytest
from environments import ROOT, Environment, torch_options
from packaging.requirements import Requirement
from packaging.version import Version

pytestmark = pytest.mark.long
SEEN = tomllib.loads((ROOT / "tests/versions_seen.toml").read_text())
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TESTED = [Requirement(text) for text in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]]
VERSIONS = "import importlib.metadata as m, json, sys; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"


@pytest.mark.parametrize("end", ["floor", "newest"])
def test_suite_passes_at_both_ends_of_every_range(end: str, sources: Path, tmp_path: Path) -> None:
    environment = Environment.new(tmp_path, sources)
    if end == "floor":
        floors = {r.name: bound.version for r in TESTED for bound in r.specifier if bound.operator in (">=", "==")}
        environment.install(*torch_options(floors.pop("torch")))
        environment.install(*(f"{name}=={version}" for name, version in floors.items()))
    else:
        environment.install(*torch_options(SEEN["newest"]["torch"]))
        environment.install("--upgrade", *(f"{r.name}{r.specifier}" for r in TESTED if r.name != "torch"))
    environment.install("--no-deps", "-e", sources)
    names = [requirement.name for requirement in TESTED]
    installed = {n: Version(v).public for n, v in json.loads(environment.python("-c", VERSIONS, *names)).items()}
    print(f"\n[{end}]\n" + "\n".join(f'{name} = "{version}"' for name, version in sorted(installed.items())))
    for name, version in installed.items():
        assert Version(version).release[:2] == Version(SEEN[end][name]).release[:2], (
            f"{name}: {version} is not recorded"
        )
    print(environment.python("-m", "pytest", "-rs", HF_HUB_OFFLINE="1")[-2000:])

"""Each range of pyproject.toml begins and ends where a run of the tests has been: see tests/versions_seen.toml."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

import attnres

ROOT = Path(__file__).parents[1]
SEEN = tomllib.loads((ROOT / "tests/versions_seen.toml").read_text())
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
REQUIREMENTS = [Requirement(text) for text in sum(EXTRAS.values(), PROJECT["dependencies"])]


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=str)
def test_range_begins_and_ends_with_versions_that_a_run_has_seen(requirement: Requirement) -> None:
    lowest, newest = (Version(SEEN[end][requirement.name]) for end in ("floor", "newest"))
    bounds = {bound.operator: bound.version for bound in requirement.specifier}
    if "==" in bounds:
        assert lowest == newest == Version(bounds["=="])
        return
    assert Version(bounds[">="]) == lowest
    # The release line of the newest: its later patch releases, and nothing else that no run has seen.
    assert Version(bounds["<"]) == Version(f"{newest.major}.{newest.minor + 1}")
    assert {lowest, newest} <= set(requirement.specifier.filter([lowest, newest]))


def test_every_version_seen_belongs_to_a_range() -> None:
    names = {requirement.name for requirement in REQUIREMENTS}
    assert set(SEEN["floor"]) == set(SEEN["newest"]) == names


def test_locked_versions_and_the_default_torch_are_inside_the_ranges() -> None:
    text = (ROOT / "requirements.lock").read_text() + (ROOT / "Makefile").read_text()
    locked = dict(re.findall(r"^(?:TORCH \?= )?([a-z0-9._-]+)==([0-9.]+)", text, re.MULTILINE))
    ranges = {requirement.name: requirement.specifier for requirement in REQUIREMENTS}
    assert set(map(lambda text: Requirement(text).name, PROJECT["dependencies"] + EXTRAS["dev"])) <= set(locked)
    assert not {name: version for name, version in locked.items() if version not in ranges.get(name, SpecifierSet())}


def test_every_extra_has_a_test_that_installs_it_and_carries_out_its_recipe() -> None:
    text = (ROOT / "tests/long/test_extras.py").read_text()
    assert sorted(re.findall(r"^def test_([a-z]+)_extra_", text, re.MULTILINE)) == sorted(EXTRAS)


def test_citation_names_the_version_of_the_package():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == attnres.__version__ and cited["cff-version"] == "1.2.0"
    assert {"title", "message", "authors", "license"} <= cited.keys()

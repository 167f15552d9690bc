"""Where a result came from: what is recorded with and without git, and that nothing secret is."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from attnres.files import provenance
from attnres.processes.hardware import hardware

ROOT = Path(__file__).parents[2]


def git(folder: Path, *words: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=n", "-c", "user.email=e", *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """A repository that holds a package with this module."""
    path = tmp_path / "attnres" / "files" / "provenance.py"
    path.parent.mkdir(parents=True)
    shutil.copy(ROOT / "attnres" / "files" / "provenance.py", path)
    monkeypatch.setattr(provenance, "__file__", str(path))
    return tmp_path


def test_git_state_is_the_commit_and_whether_tracked_files_changed(package):
    git(package, "init", "-q")
    git(package, "add", "-A")
    git(package, "commit", "-qm", "one")
    assert provenance.git_state() == {"sha": git(package, "rev-parse", "HEAD"), "dirty": False}
    (package / "untracked").write_text("")
    assert provenance.git_state()["dirty"] is False
    (package / "attnres" / "files" / "provenance.py").write_text("changed")
    assert provenance.git_state()["dirty"] is True


def test_git_state_is_unknown_without_git_and_inside_somebody_elses_repository(package, monkeypatch):
    unknown = {"sha": None, "dirty": None}
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(package.parent))
    assert provenance.git_state() == unknown
    git(package, "init", "-q")
    (package / "other.py").write_text("")
    git(package, "add", "other.py")
    git(package, "commit", "-qm", "one")
    assert provenance.git_state() == unknown
    monkeypatch.setenv("PATH", "")
    assert provenance.git_state() == unknown


def test_versions_are_of_every_package_and_none_where_it_is_missing(monkeypatch):
    monkeypatch.setattr(provenance, "PACKAGES", ("torch", "no-such-package"))
    found = provenance.versions()
    assert found.keys() == {"python", "torch", "no-such-package"}
    assert found["no-such-package"] is None and found["torch"] and found["python"]


def test_collect_is_plain_and_holds_no_secret():
    record = provenance.collect(
        "train.py hf_token=hf_abcdefghijklmnopqrst seed=3", hardware(), {"training": 3}, {"data": None}
    )
    assert json.loads(json.dumps(record)) == record
    assert record["command"] == "train.py hf_token=*** seed=3"
    assert record["seeds"] == {"training": 3} and record["hashes"] == {"data": None}
    assert record["hardware"]["cpu_count"] >= 1


def test_command_line_is_that_of_this_process_without_secrets(monkeypatch):
    monkeypatch.setattr(provenance.sys, "argv", ["probe.py", "--token", "abc", "ckpt=a"])
    assert provenance.command_line().endswith(" probe.py --token *** ckpt=a")

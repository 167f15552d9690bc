"""The short form of the fault suite, and the hook that it uses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from attnres import faults

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """What `python -m tests.faults` found, by name."""
    folder = tmp_path_factory.mktemp("faults")
    command = [sys.executable, "-m", "tests.faults", "--out", str(folder / "out"), "--work", str(folder)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode in (0, 1), done.stderr[-3000:]
    found = json.loads((folder / "out" / "summary.json").read_text())["outcomes"]
    return {outcome["name"]: outcome for outcome in found}


@pytest.mark.slow
def test_short_form_is_as_promised(outcomes: dict[str, dict[str, str]]) -> None:
    wrong = {name: outcome["wrong"] for name, outcome in outcomes.items() if not outcome["ok"]}
    assert not wrong
    assert len(outcomes) >= 25


@pytest.mark.slow
@pytest.mark.parametrize("part", ["scenario", "hostile", "special", "flips"])
def test_short_form_plays_every_part(outcomes: dict[str, dict[str, str]], part: str) -> None:
    assert any(outcome["part"] == part for outcome in outcomes.values())


def test_every_point_stands_in_the_code_once_and_no_other() -> None:
    text = "".join(path.read_text() for path in (ROOT / "attnres").rglob("*.py") if path.name != "faults.py")
    found = [part.split('"')[0] for part in text.split('faults.point("')[1:]]
    assert sorted(found) == sorted(faults.POINTS)


@pytest.mark.parametrize("text", ["train.step", "nowhere:kill", "train.step:rm", "train.step@x:kill", "a:b:c"])
def test_fault_refuses_what_it_does_not_know(text: str) -> None:
    with pytest.raises(ValueError, match="expected POINT"):
        faults.Fault.parse(text)


def test_fault_strikes_at_its_pass_on_its_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "_armed", faults.Fault.parse("train.step@2#1:enospc"))
    for rank in ("0", "1", "0"):
        monkeypatch.setenv("RANK", rank)
        faults.point("train.step")
        faults.point("train.batch")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(OSError, match="No space"):
        faults.point("train.step")
    faults.point("train.step")

"""The command: a process of its own for the implementation, its answer, and its exit code."""

from pathlib import Path

import pytest

from attnres.commands import conformance

READS = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def beside_the_reads(monkeypatch):
    monkeypatch.chdir(READS)


def test_conformance_of_two_reads_says_which_deviates(capsys):
    assert conformance.main(["faulty_reads:read", "faulty_reads:cold", "--adapter", "faulty_reads:other_names"]) == 5
    right, wrong = capsys.readouterr().out.split("\n\n")
    assert right.splitlines()[1] == "conforms (84 checks)"
    assert wrong.splitlines()[1].startswith("deviates in ") and "  plain             weights " in wrong
    assert "one_source" not in wrong


def test_conformance_runs_a_peer_that_is_installed_under_our_name(tmp_path, monkeypatch, capsys):
    (tmp_path / "attnres").mkdir()
    (tmp_path / "attnres" / "__init__.py").write_text((READS / "faulty_reads.py").read_text())
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    table = tmp_path / "table.md"
    assert conformance.main(["attnres:read", "--append", str(table)]) == 0
    assert "conforms (84 checks)" in capsys.readouterr().out
    assert table.read_text().startswith("| `attnres:read` | ")


@pytest.mark.parametrize(
    ("words", "code", "line"),
    [
        (["nowhere:read"], 2, "error: nowhere:read: ModuleNotFoundError: No module named 'nowhere'"),
        (["faulty_reads:read", "--python", "nowhere"], 2, "error: --python nowhere: "),
        (["faulty_reads:read", "--variant", "new"], 2, "error: --variant 'new': expected one of 'values normalised'"),
        (["faulty_reads:dies"], 5, "error: faulty_reads:dies: the process ended with 9 in case one_source"),
    ],
)
def test_conformance_that_cannot_run_is_one_line_and_its_code(words, code, line, capsys):
    assert conformance.main(words) == code
    assert capsys.readouterr().err.startswith(line)

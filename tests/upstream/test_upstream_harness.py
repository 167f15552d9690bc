"""What `python -m tests.upstream` makes of a source archive and of the outcomes; none of the library's tests runs."""

import tarfile
import tomllib
from pathlib import Path

import pytest

from tests.upstream import __main__ as upstream

OUTCOMES = """<testsuites><testsuite>
<testcase classname="model_tests.qwen3" name="test_save"/>
<testcase classname="model_tests.full" name="test_save"><failure message="differs"/></testcase>
<testcase classname="model_tests.qwen3" name="test_cache"/>
<testcase classname="model_tests.full" name="test_cache"/>
<testcase classname="model_tests.full" name="test_cache"><error message="at its end"/></testcase>
<testcase classname="model_tests.qwen3" name="test_tie"/>
<testcase classname="model_tests.full" name="test_tie"><skipped message="no head"/></testcase>
<testcase classname="model_tests.qwen3" name="test_slow"><skipped message="slow"/></testcase>
<testcase classname="model_tests.full" name="test_slow"><failure message="never asked"/></testcase>
<testcase classname="model_tests.qwen3" name="test_good"/>
<testcase classname="model_tests.full" name="test_good"/>
</testsuite></testsuites>"""


@pytest.fixture
def results(tmp_path: Path) -> upstream.Results:
    (tmp_path / "outcomes.xml").write_text(OUTCOMES)
    return upstream.read_outcomes(tmp_path / "outcomes.xml")


def test_what_qwen3_passes_and_ours_fails_or_skips_is_behind(results: upstream.Results) -> None:
    behind = upstream.behind_stock(results, ("full",))
    assert {test: row["full"] for test, row in behind.items()} == {
        "test_cache": "failed",
        "test_save": "failed",
        "test_tie": "skipped",
    }


def test_a_convention_that_was_not_run_is_behind(results: upstream.Results) -> None:
    assert set(upstream.behind_stock(results, ("full", "cumulative"))) >= {"test_good"}


@pytest.mark.parametrize(
    ("excepted", "said"),
    [
        ({"test_cache", "test_save", "test_tie"}, []),
        ({"test_cache", "test_save"}, ["behind qwen3: test_tie"]),
        ({"test_cache", "test_save", "test_tie", "test_good"}, ["not behind any more: test_good"]),
    ],
)
def test_exceptions_excuse_what_they_name_and_nothing_that_passes(
    results: upstream.Results, excepted: set[str], said: list[str]
) -> None:
    reasons = dict.fromkeys(excepted, "why")
    assert upstream.faults(results, ("full",), reasons) == said


def test_outcomes_without_a_yardstick_are_a_fault() -> None:
    assert upstream.faults({"model_tests.py": {"": "failed"}}, ("full",), {}) == [
        "qwen3 passed no test: nothing to compare with"
    ]


def test_folder_without_the_tests_is_refused_naming_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert upstream.main([str(tmp_path)]) == 2
    assert "tests/generation/test_utils.py" in capsys.readouterr().err


def test_archive_of_a_tag_is_unpacked_to_the_folder_in_it(tmp_path: Path) -> None:
    folder = tmp_path / "transformers-1.0"
    for name in upstream.NEEDED:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    with tarfile.open(tmp_path / "v1.0.tar.gz", "w:gz") as archive:
        archive.add(folder, arcname=folder.name)
    with upstream.unpacked(tmp_path / "v1.0.tar.gz") as root:
        assert (root.name, (root / "tests/causal_lm_tester.py").is_file()) == (folder.name, True)


def test_exceptions_are_at_most_ten_and_give_reasons() -> None:
    reasons = tomllib.loads((upstream.HERE / "exceptions.toml").read_text())
    assert len(reasons) <= 10
    assert all(len(reason.split()) >= 5 for reason in reasons.values())

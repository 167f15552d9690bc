"""`python -m tests.upstream SOURCES`: transformers' own model tests against Block AttnRes Qwen3.

SOURCES is the source archive of the installed version's git tag (`v` and the version), or a folder of it: the package
index's source archive lacks the generation and causal-LM tests. They run on stock Qwen3, which is the yardstick, and
in all source conventions. The table names every test that stock Qwen3 passes and one of ours does not. The command
ends with 1 where `exceptions.toml` does not name such a test, or names a test that passes.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

from attnres.depth.plan import CONVENTIONS

HERE = Path(__file__).resolve().parent
NEEDED = (
    "tests/__init__.py",
    "tests/causal_lm_tester.py",
    "tests/generation/test_utils.py",
    "tests/models/qwen3/test_modeling_qwen3.py",
    "tests/test_modeling_common.py",
    "src/transformers/__init__.py",
)
STOCK = "qwen3"
PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"
Results = dict[str, dict[str, str]]


class Unusable(Exception):
    """SOURCES holds no tests that could be run; the message says what is missing."""


@contextmanager
def unpacked(sources: Path) -> Iterator[Path]:
    """The folder that holds the library's `tests`, unpacked for as long as it is needed.

    Raises:
        Unusable: naming the files that it lacks.
    """
    with tempfile.TemporaryDirectory() as temporary:
        root = sources.resolve()
        if root.is_file():
            shutil.unpack_archive(root, temporary, filter="data")
            root = next((folder for folder in Path(temporary).iterdir() if folder.is_dir()), Path(temporary))
        if missing := [name for name in NEEDED if not (root / name).exists()]:
            raise Unusable(f"{sources} lacks {', '.join(missing)}; take the source archive of the version's git tag")
        yield root


def run(root: Path, select: str | None = None, processes: int = 2) -> Results:
    """The outcome of each test, `{test: {column: outcome}}`; `select` is pytest's `-k`."""
    with tempfile.TemporaryDirectory() as temporary:
        outcomes = Path(temporary) / "outcomes.xml"
        command = [sys.executable, "-m", "pytest", str(HERE / "model_tests.py"), "-q", "--tb=short", "--no-header"]
        command += ["-c", os.devnull, "--rootdir", str(root), "-p", "no:cacheprovider", "-W", "ignore"]
        command += ["-n", str(processes), f"--junitxml={outcomes}", *(["-k", select] if select else [])]
        path = os.pathsep.join([str(root), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
        environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **os.environ, "PYTHONPATH": path}
        subprocess.run(command, cwd=root, env=environment, check=False)
        if not outcomes.exists():
            raise Unusable("pytest wrote no outcomes; see above")
        return read_outcomes(outcomes)


def read_outcomes(path: Path) -> Results:
    """`{test: {column: outcome}}` from pytest's JUnit file, in which a class is a column."""
    results: Results = defaultdict(dict)
    for case in ElementTree.parse(path).iter("testcase"):
        bad = any(case.find(tag) is not None for tag in ("failure", "error"))
        outcome = FAILED if bad else SKIPPED if case.find("skipped") is not None else PASSED
        column = case.attrib["classname"].rpartition(".")[2]
        # A test can stand there twice, for its body and for what came after it.
        if results[case.attrib["name"]].get(column) != FAILED:
            results[case.attrib["name"]][column] = outcome
    return dict(results)


def behind_stock(results: Results, conventions: Sequence[str]) -> Results:
    """The tests that stock Qwen3 passes and a convention does not."""
    return {
        test: columns
        for test, columns in sorted(results.items())
        if columns.get(STOCK) == PASSED and any(columns.get(name) != PASSED for name in conventions)
    }


def table(rows: Results, columns: Sequence[str]) -> str:
    """Markdown: a row per test, a column per model."""
    lines = [f"| test | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    lines += [f"| {test} | {' | '.join(row.get(name, 'absent') for name in columns)} |" for test, row in rows.items()]
    return "\n".join(lines)


def faults(results: Results, conventions: Sequence[str], excepted: Mapping[str, str]) -> list[str]:
    """A line for each test that no exception excuses, and for each exception that excuses nothing."""
    if not any(row.get(STOCK) == PASSED for row in results.values()):
        return [f"{STOCK} passed no test: nothing to compare with"]
    behind = behind_stock(results, conventions)
    lines = [f"behind {STOCK}: {test}" for test in behind if test not in excepted]
    return lines + [f"not behind any more: {test}" for test in excepted if test in results and test not in behind]


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.upstream", description=__doc__)
    parser.add_argument("sources", type=Path, help="source archive of the installed version's git tag, or its folder")
    parser.add_argument("-k", dest="select", help="only the tests whose names fit, as in pytest")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args(words)
    try:
        with unpacked(arguments.sources) as root:
            tested = (root / "src/transformers/__init__.py").read_text().partition('__version__ = "')[2].split('"')[0]
            results = run(root, arguments.select, arguments.processes)
    except Unusable as error:
        print(f"tests.upstream: {error}", file=sys.stderr)
        return 2
    columns = (STOCK, *CONVENTIONS)
    print(f"\nTests of transformers {tested}, run on {version('transformers')}\n")
    for column in columns:
        outcomes = [row.get(column) for row in results.values()]
        print(f"{column}: " + ", ".join(f"{outcomes.count(name)} {name}" for name in (PASSED, FAILED, SKIPPED)))
    excepted = tomllib.loads((HERE / "exceptions.toml").read_text())
    behind = behind_stock(results, CONVENTIONS)
    print(f"\n{len(behind)} that {STOCK} passes and not every convention does:\n\n{table(behind, columns)}\n")
    print(*(f"excepted: {test}: {excepted[test]}" for test in behind if test in excepted), sep="\n")
    print(*(lines := faults(results, CONVENTIONS, excepted)), sep="\n")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())

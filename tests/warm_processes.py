"""Processes that have the libraries loaded already: importing them takes longer than a tiny run."""

import multiprocessing
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from attnres.errors import AttnResError

ROOT = Path(__file__).parents[1]


def in_child(target: Callable[..., None], *arguments: Any, environment: dict[str, str] | None = None) -> Any:
    """Starts `target(*arguments)`; an error of the project ends the process with its code."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            "attnres.training.fit",
            "attnres.probe.summary",
            "attnres.statistics.judgement",
            "attnres.report.report",
            "warm_processes",
        ]
    )
    # The server does not inherit sys.path in every Python, and without it would preload nothing.
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    process = context.Process(target=_run, args=(environment or {}, target, *arguments))
    process.start()
    return process


def exit_code(process: Any, seconds: float = 120) -> int:
    """Waits for a child; a hanging one is an error."""
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError("the child did not end")
    return process.exitcode


def start_command(words: list[str], log: Path, environment: dict[str, str] | None = None) -> Any:
    """Starts `python WORDS`, a script of the repository and its arguments; output goes to `log`.out and `log`.err."""
    return in_child(_command, words, str(log), environment=environment)


def run_command(
    words: list[str], log: Path, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """`start_command`, waited for."""
    code = exit_code(start_command(words, log, environment), 300)
    out, err = (log.with_suffix(suffix).read_text(encoding="utf-8") for suffix in (".out", ".err"))
    return subprocess.CompletedProcess(words, code, out, err)


def _run(environment: dict[str, str], target: Callable[..., None], *arguments: Any) -> None:
    os.environ.update(environment)
    # Data workers would otherwise inherit the forkserver method, and each would load every library anew.
    multiprocessing.set_start_method("fork", force=True)
    try:
        target(*arguments)
    except AttnResError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.code)


def _command(words: list[str], log: str) -> None:
    for number, suffix in ((1, ".out"), (2, ".err")):
        file = os.open(Path(log).with_suffix(suffix), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    os.chdir(ROOT)
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")

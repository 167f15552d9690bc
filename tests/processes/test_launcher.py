"""A rank whose launcher is gone."""

import os
import time
from pathlib import Path

import pytest
from warm_processes import exit_code, in_child

from attnres.errors import RankLost
from attnres.processes.launcher import bound_to_launcher


def rank(log: Path, fails: bool) -> None:
    """What rank 1 does once it stands alone: a collective fails, or it goes on waiting in one."""
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
    os.environ["LOCAL_RANK"] = "1"
    parent = os.getppid()
    try:
        with bound_to_launcher():
            while os.getppid() == parent:
                time.sleep(0.01)
            if fails:
                raise RankLost("rank 0 died: says the main thread")
            time.sleep(60)
    except RankLost as error:
        # Unwinding takes longer than the watch takes to notice.
        time.sleep(1.0)
        os.write(2, str(error).encode())
    os._exit(RankLost.code)


def launcher(log: str, fails: bool) -> None:
    if os.fork() == 0:
        rank(Path(log), fails)
    time.sleep(0.3)


@pytest.mark.parametrize(("fails", "message"), [(True, "says the main thread"), (False, "error: rank 0 died")])
def test_rank_says_that_its_launcher_died_before_it_ends(tmp_path: Path, fails: bool, message: str) -> None:
    log = tmp_path / "log"
    assert exit_code(in_child(launcher, str(log), fails)) == 0
    deadline = time.monotonic() + 20
    while message not in (log.read_text() if log.exists() else "") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert message in log.read_text()

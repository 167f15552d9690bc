"""The way in and out of every command: one line, its exit code, and signals."""

import errno
import os
import signal
import subprocess
import sys
from argparse import ArgumentParser

import pytest

from attnres import errors
from attnres.commands.door import parsed_command, report_error, run_command
from attnres.errors import AttnResError, ConfigError
from attnres.processes.signals import STOP_SIGNALS

CLASSES = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.AttnResError)]
CODES = {
    **{"AttnResError": 1, "ConfigError": 2, "DataError": 3, "CheckpointError": 4, "NumericsError": 5},
    **{"StorageError": 6, "RankLost": 1, "Stopped": 75},
}
# A command in a process of its own. What it does stands in `body`, which says "ready" when a signal may come.
COMMAND = """
import os, signal, subprocess, sys, time
from attnres.commands.door import run_command
{before}
def command():
{body}
sys.exit(run_command(command))
"""


def raises(error: BaseException):
    def command() -> None:
        raise error

    return command


def start(body: str, before: str = "", **environment: str) -> subprocess.Popen[str]:
    """Starts a command; `before` stands in front of it, in one line."""
    script = COMMAND.format(body="\n".join(f"    {line}" for line in body.strip().splitlines()), before=before)
    return subprocess.Popen(
        [sys.executable, "-c", script],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | environment,
    )


def send_when_ready(process: subprocess.Popen[str], number: signal.Signals) -> str:
    """What the process writes to standard error until it ends."""
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(number)
    return process.communicate(timeout=60)[1]


@pytest.mark.parametrize("kind", CLASSES)
def test_an_error_is_one_line_and_its_code(kind, capsys):
    assert run_command(raises(kind("here: this is wrong;\n do that"))) == kind.code == CODES[kind.__name__]
    assert capsys.readouterr() == ("", "error: here: this is wrong; do that\n")


def test_a_command_gives_its_code():
    assert [run_command(lambda: None), run_command(lambda: 5)] == [0, 5]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "runs/a"), "error: runs/a: No space left on device; "),
        (OSError("odd"), "error: file: odd; "),
        (PermissionError(errno.EACCES, "Permission denied", b"\xff"), "error: b'\\xff': Permission denied; "),
    ],
)
def test_an_error_of_the_system_is_one_of_storage(error, line, capsys):
    assert run_command(raises(error)) == 6
    assert capsys.readouterr().err == f"{line}check space and permissions\n"


@pytest.mark.parametrize("error", [MemoryError("Unable to allocate 7 GiB"), OSError(errno.ENOMEM, "no memory")])
def test_too_little_memory_is_one_line_and_2_in_every_command(error, capsys):
    assert run_command(raises(error)) == 2
    assert capsys.readouterr().err == f"error: out of memory ({error}); free memory, or take a machine with more\n"


def test_an_unexpected_error_says_so(capsys):
    assert run_command(raises(ZeroDivisionError("division by zero"))) == 1
    line = capsys.readouterr().err
    assert line.startswith("error: unexpected ZeroDivisionError: division by zero; run again with debug=true")
    assert line.count("\n") == 1


def test_debug_shows_the_traceback_before_the_line(capsys):
    assert run_command(raises(ConfigError("wrong")), debug=True) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback") and shown.endswith("\nerror: wrong\n")


def test_an_interrupt_is_a_stop(capsys):
    assert run_command(raises(KeyboardInterrupt())) == 75
    assert (
        capsys.readouterr().err == "error: interrupted before the next step could be saved; the same command resumes\n"
    )


def test_an_error_shows_no_control_characters_and_ends(capsys):
    report_error(AttnResError("a\x1b[31mred\x07\u202e\x9b\udc80 \r\n b" + "x" * 3000))
    line = capsys.readouterr().err
    assert line.startswith("error: a?[31mred???? bxxx") and line.endswith(" ...\n")
    assert line[:-1].isprintable() and len(line) < 2100


@pytest.mark.parametrize(
    "words",
    [
        *(["attnres.commands.report", "{}"], ["attnres.commands.rejudge", "{}"]),
        ["attnres.commands.rejudge", "{}", "--out", "out"],
        ["attnres.commands.documents", "--run", "{}", "--step", "1"],
        ["attnres.commands.judge", "{}.csv", "--margin", "1"],
    ],
    ids=lambda words: " ".join(words),
)
def test_no_command_shows_control_characters_of_a_path(words, tmp_path):
    hostile = "no\x1b[31mwhere"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", *(word.format(hostile) for word in words)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode in (2, 3, 4, 6), done.stderr
    assert "no?[31mwhere" in done.stderr and "\x1b" not in done.stderr + done.stdout
    assert done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_ends_a_command_with_75_and_a_line(number):
    process = start("print('ready', flush=True)\nwhile True: pass")
    shown = send_when_ready(process, number)
    assert process.returncode == 75
    assert shown.strip() == f"error: {number.name} stopped the command; the same command goes on"


def test_a_handler_of_another_library_gets_a_signal_before_which_nothing_is_to_be_saved():
    process = start(
        "print('ready', flush=True)\ntime.sleep(60)", before="signal.signal(signal.SIGUSR2, lambda *_: sys.exit(7))"
    )
    assert (send_when_ready(process, signal.SIGUSR2), process.returncode) == ("", 7)


SAVES = """
from attnres.processes.signals import StopSignals
with StopSignals("saving", "", can_save=True) as signals:
    print('ready', flush=True)
    while not signals.asked(): time.sleep(0.01)
    print('saved', flush=True)
    signals.hand_on()
print('goes on')
"""


def test_a_handler_of_another_library_gets_a_signal_once_everything_is_saved():
    process = start(SAVES, before="signal.signal(signal.SIGUSR2, lambda *_: (print('theirs'), sys.exit(7)))")
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGUSR2)
    shown = process.communicate(timeout=60)
    assert (shown, process.returncode) == (
        ("saved\ntheirs\n", "\nSIGUSR2: saving, then handing the signal on\n"), 7
    )  # fmt: skip


def test_a_command_goes_on_where_the_handler_of_another_library_returns():
    process = start(SAVES, before="signal.signal(signal.SIGTERM, lambda *_: print('theirs'))")
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60)[0] == "saved\ntheirs\ngoes on\n" and process.returncode == 0


def test_the_signal_that_submitit_was_told_to_use_is_a_stop_signal():
    before = "signal.signal(signal.SIGHUP, lambda *_: sys.exit(7))"
    process = start(SAVES, before=before, SUBMITIT_PREEMPT_SIGNAL="HUP")
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGHUP)
    assert process.communicate(timeout=60)[0] == "saved\n" and process.returncode == 7


def test_a_forked_process_dies_of_a_signal_and_its_parent_goes_on():
    """The pipe that tells of signals is shared: the parent must not take its child's signals for its own."""
    process = start("""
child = os.fork()
if child == 0:
    time.sleep(300)
time.sleep(0.2)
os.kill(child, signal.SIGTERM)
status = os.waitpid(child, 0)[1]
time.sleep(0.5)
print(os.WTERMSIG(status) if os.WIFSIGNALED(status) else -1)
""")
    assert (*process.communicate(timeout=60), process.returncode) == (f"{int(signal.SIGTERM)}\n", "", 0)


def test_a_signal_ends_a_rank_that_is_not_bound_to_its_launcher(monkeypatch):
    """It must neither go on nor hand the signal to whoever its parent is."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    process = start("print('ready', flush=True)\nwhile True: pass")
    send_when_ready(process, signal.SIGTERM)
    assert process.returncode == 75


def test_a_process_that_is_forked_while_something_can_be_saved_ignores_the_signal():
    process = start("""
from attnres.processes.signals import StopSignals
with StopSignals("saving", "", can_save=True):
    child = os.fork()
    if child == 0:
        time.sleep(0.5)
        os._exit(7)
    time.sleep(0.2)
    os.kill(child, signal.SIGTERM)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
""")
    assert (*process.communicate(timeout=60), process.returncode) == ("7\n", "", 0)


def test_debug_shows_the_traceback_of_a_parsed_command(capsys):
    def fails(given):
        raise ZeroDivisionError("here")

    assert parsed_command(ArgumentParser(), fails, ["--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_command_leaves_the_handlers_as_they_were():
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    run_command(lambda: None)
    run_command(raises(ConfigError("wrong")))
    assert {number: signal.getsignal(number) for number in before} == before
    assert signal.set_wakeup_fd(-1) == -1


def test_a_command_refuses_unsafe_loading(monkeypatch, capsys):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    assert run_command(lambda: pytest.fail("ran")) == 2
    assert "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["report", "rejudge", "error_rates", "judge"])
def test_help_of_a_command_on_tables_loads_no_large_library(name):
    code = (
        "import runpy, sys; sys.argv = ['command', '--help']\n"
        f"try: runpy.run_module('attnres.commands.{name}', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code\n"
        "print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "attnres.commands.door" in loaded
    assert not loaded & {"torch", "pandas", "numpy", "hydra", "transformers", "lightning", "matplotlib", "scipy"}

"""The way in and out of every command: one line on stderr for an error, and the exit code that goes with it.

Standard output carries what a script wants (a folder, a path, a table); everything else goes to stderr.
"""

import logging
import sys
import traceback
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, distribution

from attnres.errors import AttnResError, ConfigError, Stopped, StorageError, one_line
from attnres.files.run_folder import refuse_unsafe_loading
from attnres.processes.memory import is_out_of_memory
from attnres.processes.signals import StopSignals

logger = logging.getLogger(__name__)

_MOST_CHARACTERS = 2000
_NOTHING_SAVED = "stopped the command; the same command goes on"
_NOISY = ("lightning", "httpx", "filelock", "matplotlib", "fontTools", "wandb", "datasets", "huggingface_hub")


def run_command(command: Callable[[], int | None], debug: bool = False) -> int:
    """Runs a command with logging, stop signals and errors as every command has them.

    Args:
        command: returns its exit code, None for 0. No file of its is ever half written, so that a signal may end it
            anywhere; one that has something to save has `StopSignals` of its own.
        debug: show tracebacks as well.

    Returns:
        The exit code: that of the error, where there was one.
    """
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        with StopSignals("", _NOTHING_SAVED):
            refuse_unsafe_loading()
            _look_for_namesake()
            return command() or 0
    except Exception as error:
        if debug:
            traceback.print_exc()
        return report_error(_of_this_project(error))
    except KeyboardInterrupt:
        return report_error(Stopped("interrupted before the next step could be saved; the same command resumes"))


def parsed_command(
    parser: ArgumentParser, run: Callable[[Namespace], int | None], arguments: Sequence[str] | None
) -> int:
    """A command whose words argparse reads: `run_command` of `run` on what `parser` makes of `arguments`.

    Args:
        parser: exits with 2 by itself where the words are wrong.
        arguments: None takes those of the process.
    """
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    given = parser.parse_args(arguments)
    return run_command(lambda: run(given), given.debug)


def report_error(error: AttnResError) -> int:
    """Prints the one line of an error, and returns its exit code."""
    # A message may quote a file from anywhere: no control characters for the terminal, and an end.
    message = "".join(c if c.isprintable() else "?" for c in one_line(error, most=None))
    shown = message if len(message) <= _MOST_CHARACTERS else message[:_MOST_CHARACTERS] + " ..."
    sys.stderr.write(f"error: {shown}\n")
    return error.code


def _look_for_namesake() -> None:
    """Says where fast-attnres, which imports as `attnres` too, is in the way. Pip lets either overwrite the other.

    Raises:
        ConfigError: the package's `__init__.py` is that one's, or was uninstalled with it.
    """
    remedy = "pip uninstall fast-attnres, install attnres again, and give each an environment of its own"
    if "load_model" not in getattr(sys.modules["attnres"], "__all__", ()):
        raise ConfigError(
            f"attnres/__init__.py is not this package's: fast-attnres imports as attnres too and replaced it; {remedy}"
        )
    with suppress(PackageNotFoundError):
        distribution("fast-attnres")
        logger.warning("fast-attnres is installed too and imports as attnres, so that one hides the other; %s", remedy)


def _of_this_project(error: Exception) -> AttnResError:
    if isinstance(error, AttnResError):
        return error
    if is_out_of_memory(error):
        return ConfigError(f"out of memory ({one_line(error, most=200)}); free memory, or take a machine with more")
    if isinstance(error, OSError):
        where = error.filename or "file"
        return StorageError(f"{where}: {error.strerror or error}; check space and permissions")
    again = "run again with debug=true (or --debug) for the traceback, and report it"
    return AttnResError(f"unexpected {type(error).__name__}: {error}; {again}")

"""The two commands: compose the configuration with Hydra, check it, run, and turn errors into exit codes.

One line on stderr names the cause and the remedy; a traceback only with `debug=true`. Standard output carries what a
script wants (the run folder; the report's path), everything else goes to stderr.
"""

import logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

# Hydra would tell an error in its own words and exit with 1; here errors are told by `_guarded`.
os.environ["HYDRA_FULL_ERROR"] = "1"

import hydra
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from attnres.config import build, unknown_key
from attnres.errors import AttnResError, ConfigError, Stopped, StorageError
from attnres.files.provenance import command_line
from attnres.files.run_folder import refuse_unsafe_loading

CONF = Path(__file__).parents[2] / "conf"
_MOST_TOLD = 2000
_HYDRA_SETTING = re.compile(r"^[^#\n]*\bhydra\b|@package\s+hydra", re.MULTILINE)


def train() -> None:
    """`train.py`: train one run (or several, with `-m`)."""
    _guarded("train", _train)


def probe() -> None:
    """`probe.py`: probe a checkpoint against its baseline."""
    _guarded("probe", _probe)


def plan() -> None:
    """`python -m attnres.commands.plan`: what a run needs, from `train.py`'s words and `cluster.KEY=VALUE`."""
    cluster = [word for word in sys.argv[1:] if word.startswith("cluster.")]
    sys.argv = [word for word in sys.argv if word not in cluster]
    _guarded("train", partial(_plan, cluster))


def _train(settings: dict[str, Any]) -> None:
    from attnres.training.config import TrainConfig
    from attnres.training.fit import train as run

    print(run(build(TrainConfig, settings), command_line()))


def _probe(settings: dict[str, Any]) -> None:
    from attnres.probe.config import ProbeConfig
    from attnres.probe.run import probe as run
    from attnres.probe.run import verdict_table

    result = run(build(ProbeConfig, settings), command_line())
    if result is not None:
        print(verdict_table(result.cells))
        print(result.report)


def _plan(cluster: list[str], settings: dict[str, Any]) -> None:
    from attnres.training.config import TrainConfig
    from attnres.training.cost import ClusterConfig, describe, make_plan

    words = OmegaConf.to_container(OmegaConf.from_dotlist(cluster))
    machines = build(ClusterConfig, words.get("cluster", {}) if isinstance(words, dict) else {}, "cluster")
    config = build(TrainConfig, settings)
    print(describe(config, machines, make_plan(config, machines)))


def _guarded(name: str, run: Callable[[dict[str, Any]], None]) -> None:
    """Run a command under Hydra and end the process with the right exit code."""
    debug = any(word in ("debug=true", "debug=True") for word in sys.argv)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
    for noisy in ("lightning", "httpx", "filelock", "matplotlib", "fontTools", "wandb"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    failures: list[AttnResError] = []
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    previous = {number: signal.signal(number, partial(_stop, os.getpid())) for number in numbers}
    try:
        _refuse_code_in_settings()
        refuse_unsafe_loading()
        task = hydra.main(version_base="1.3", config_path=str(CONF), config_name=name)(_plain(run, failures))
        task()
        if failures:
            raise next((failure for failure in failures if isinstance(failure, Stopped)), failures[0])
    except AttnResError as error:
        _tell(error, error.code, debug)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        told = _explain(error, name)
        _tell(told, told.code, debug)
    except KeyboardInterrupt:
        _tell(Stopped("interrupted before the next step could be saved; the same command resumes"), Stopped.code, debug)
    except OSError as error:
        _tell(
            StorageError(f"{error.filename or 'file'}: {error.strerror or error}; check space and permissions"),
            StorageError.code,
            debug,
        )
    except Exception as error:
        text = f"unexpected {type(error).__name__}: {error}; run again with debug=true for the traceback, and report it"
        _tell(RuntimeError(text), AttnResError.code, debug)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _stop(command: int, number: int, frame: FrameType | None) -> None:
    """A signal while there is nothing to save: no file is ever half written, so the process may end anywhere."""
    if os.getpid() != command:
        # A process forked from the command dies as if it had no handler.
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        return
    os.write(2, f"\nerror: stopped by {signal.Signals(number).name}; the same command goes on\n".encode())
    os._exit(Stopped.code)


def _plain(run: Callable[[dict[str, Any]], None], failures: list[AttnResError]) -> Callable[[DictConfig], None]:
    """Hand a command plain containers: no room but this one knows Hydra's types.

    A failure is kept rather than raised through Hydra, which would add lines of its own; the other jobs of a sweep in
    this process still run, unless a signal asked to stop.
    """

    def task(config: DictConfig) -> None:
        if any(isinstance(failure, Stopped) for failure in failures):
            return
        settings = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        assert isinstance(settings, dict)
        try:
            run({str(key): value for key, value in settings.items()})
        except AttnResError as error:
            in_this_process = HydraConfig.get().launcher._target_.endswith("BasicLauncher")
            if not in_this_process:
                raise
            failures.append(error)
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                logging.error("job %s failed: %s", HydraConfig.get().job.num, error)

    return task


def _refuse_code_in_settings() -> None:
    """Hydra would run what a pickle, or its own settings in a configuration from elsewhere, name."""
    if any(word.startswith("--experimental-rerun") for word in sys.argv):
        raise ConfigError("--experimental-rerun: loads a pickle, which can run code; give the overrides instead")
    if any(word.lstrip("+~").startswith("hydra.searchpath") for word in sys.argv):
        raise ConfigError("hydra.searchpath: give the folder with --config-dir instead")
    for flag, value in zip(sys.argv, [*sys.argv[1:], ""], strict=True):
        name, given, path = flag.partition("=")
        if name not in ("--config-dir", "-cd", "--config-path", "-cp"):
            continue
        for file in sorted(Path(path if given else value).rglob("*.y*ml")):
            if _HYDRA_SETTING.search(file.read_text(encoding="utf-8", errors="replace")):
                raise ConfigError(
                    f"{file}: sets Hydra's own settings, which can run code; set them in conf/ or by hand"
                )


def _tell(error: Exception, code: int, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    # A message may quote a file from anywhere: no control characters for the terminal, and an end.
    told = "".join(c if c.isprintable() else "?" for c in " ".join(str(error).split()))
    print(f"error: {told if len(told) <= _MOST_TOLD else told[:_MOST_TOLD] + ' ...'}", file=sys.stderr)
    sys.exit(code)


def _explain(error: Exception, name: str) -> ConfigError:
    """Hydra's complaint in one line, with the nearest key or option."""
    text = str(error)
    if match := re.search(r"Could not override '([^']+)'", text):
        path = match[1].split("@")[0].replace("/", ".")
        where, _, key = path.rpartition(".")
        known = _known_keys(name)
        if siblings := {other.rpartition(".")[2] for other in known if other.rpartition(".")[0] == where}:
            return unknown_key(path, key, siblings, where)
        return unknown_key(path, path, known)
    if match := re.search(r"Could not find '([^']+)'", text):
        group, _, option = match[1].rpartition("/")
        options = sorted(file.stem for file in (CONF / group).glob("*.yaml"))
        if options:
            return unknown_key(match[1], option, options, group.replace("/", "."))
        return ConfigError(f"unknown configuration group {match[1]!r}; known: {', '.join(_groups())}")
    return ConfigError(text.splitlines()[0] if text else type(error).__name__)


def _groups() -> list[str]:
    return sorted(folder.name for folder in CONF.iterdir() if folder.is_dir())


def _known_keys(name: str) -> set[str]:
    """Every dotted key of a command's default configuration, groups included."""
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        settings = OmegaConf.to_container(hydra.compose(name))
    keys: set[str] = set()

    def walk(value: Any, where: str) -> None:
        for key, inner in value.items() if isinstance(value, dict) else ():
            path = f"{where}.{key}" if where else str(key)
            keys.add(path)
            walk(inner, path)

    walk(settings, "")
    return keys

"""Hydra, and only here: composes the configuration of a command, and says what is wrong with it in our words.

The rest of the package gets plain containers and knows nothing of Hydra.
"""

import logging
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Hydra would report an error in its own words and exit with 1; `attnres.commands.door` reports it.
os.environ["HYDRA_FULL_ERROR"] = "1"

import hydra
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from attnres.commands.door import run_command
from attnres.config import unknown_key
from attnres.errors import AttnResError, ConfigError, Stopped

CONF = Path(__file__).parents[2] / "conf"
Plain = dict[str, Any]
_HYDRA_KEYS = re.compile(r"^[^#\n]*\bhydra\b|@package\s+hydra", re.MULTILINE)


def configured_command(name: str, run: Callable[[Plain], None]) -> None:
    """Runs a command on the configuration that Hydra composes from the process's words, and ends the process.

    Args:
        name: of the configuration in `conf/`: `"train"` or `"probe"`.
    """
    debug = any(word in ("debug=true", "debug=True") for word in sys.argv)
    sys.exit(run_command(lambda: _composed(name, run), debug))


def _composed(name: str, run: Callable[[Plain], None]) -> None:
    failures: list[AttnResError] = []
    _refuse_code_in_configurations()
    try:
        hydra.main(version_base="1.3", config_path=str(CONF), config_name=name)(_job(run, failures))()
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise _explained(error, name) from error
    if failures:
        raise next((failure for failure in failures if isinstance(failure, Stopped)), failures[0])


def _job(run: Callable[[Plain], None], failures: list[AttnResError]) -> Callable[[DictConfig], None]:
    """One job of Hydra's, which may run several in this process.

    A failure is kept rather than raised through Hydra, which would add lines of its own; the other jobs of a sweep in
    this process still run, unless a signal asked to stop.
    """

    def job(config: DictConfig) -> None:
        if any(isinstance(failure, Stopped) for failure in failures):
            return
        plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        assert isinstance(plain, dict)
        try:
            run({str(key): value for key, value in plain.items()})
        except AttnResError as error:
            in_this_process = HydraConfig.get().launcher._target_.endswith("BasicLauncher")
            if not in_this_process:
                raise
            failures.append(error)
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                logging.error("job %s failed: %s", HydraConfig.get().job.num, error)

    return job


def plain_words(words: list[str]) -> Plain:
    """`a.b=1` words as nested plain containers, values read as Hydra reads them."""
    plain = OmegaConf.to_container(OmegaConf.from_dotlist(words))
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _refuse_code_in_configurations() -> None:
    """Hydra would run what a pickle, or its own keys in a configuration from elsewhere, name."""
    if any(word.startswith("--experimental-rerun") for word in sys.argv):
        raise ConfigError("--experimental-rerun: loads a pickle, which can run code; give the overrides instead")
    if any(word.lstrip("+~").startswith("hydra.searchpath") for word in sys.argv):
        raise ConfigError("hydra.searchpath: give the folder with --config-dir instead")
    for flag, value in zip(sys.argv, [*sys.argv[1:], ""], strict=True):
        name, given, path = flag.partition("=")
        if name not in ("--config-dir", "-cd", "--config-path", "-cp"):
            continue
        for file in sorted(Path(path if given else value).rglob("*.y*ml")):
            if _HYDRA_KEYS.search(file.read_text(encoding="utf-8", errors="replace")):
                raise ConfigError(
                    f"{file}: sets Hydra's own settings, which can run code; set them in conf/ or by hand"
                )


def _explained(error: Exception, name: str) -> ConfigError:
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
        groups = sorted(folder.name for folder in CONF.iterdir() if folder.is_dir())
        return ConfigError(f"unknown configuration group {match[1]!r}; known: {', '.join(groups)}")
    return ConfigError(text.splitlines()[0] if text else type(error).__name__)


def _known_keys(name: str) -> set[str]:
    """Every dotted key of a command's default configuration, groups included."""
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        plain = OmegaConf.to_container(hydra.compose(name))
    keys: set[str] = set()

    def walk(value: Any, where: str) -> None:
        for key, inner in value.items() if isinstance(value, dict) else ():
            path = f"{where}.{key}" if where else str(key)
            keys.add(path)
            walk(inner, path)

    walk(plain, "")
    return keys

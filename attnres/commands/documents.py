"""`python -m attnres.commands.documents --run RUN --step N`: which documents an optimizer step was made of.

The batch of a step is a function of the seed and the step, so nothing has to be recorded during training: the answer
follows from the run's configuration and its corpus.
"""

import json
import signal
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import yaml

from attnres.commands.door import parsed_command
from attnres.config import build
from attnres.data.config import DataConfig
from attnres.data.preparation import prepare
from attnres.data.windows.pieces import pieces_in_step
from attnres.errors import ConfigError, DataError
from attnres.files.whole_files import read_object


def read_run(folder: Path) -> tuple[DataConfig, int, str | None]:
    """The data configuration, the global batch size and the data fingerprint of a run.

    Args:
        folder: A run folder, or its path without the hash at the end.

    Raises:
        ConfigError: It is not one, or its name without the hash is not unique.
    """
    if not folder.is_dir():
        matches = sorted(folder.parent.glob(f"{folder.name}-*/config.yaml"))
        if len(matches) != 1:
            raise ConfigError(f"--run: {len(matches)} runs match {folder}; give one run folder")
        folder = matches[0].parent
    try:
        plain = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        config = build(DataConfig, plain["data"], "data")
        size = int(plain["trainer"]["global_batch_size"])
        fingerprint = read_object(folder / "provenance.json").get("hashes", {}).get("data")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"--run: {folder} is not a run folder ({error!r}); give one that train.py printed") from error
    return config, size, fingerprint


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the pieces of documents of a step, a line of JSON each; returns the exit code."""
    parser = ArgumentParser(
        prog="python -m attnres.commands.documents",
        description="Which documents an optimizer step of a run was made of.",
    )
    parser.add_argument("--run", type=Path, required=True, help="a run folder; the hash may be left out")
    parser.add_argument("--step", type=int, required=True, help="optimizer step as in metrics.csv: 1 is the first")
    return parsed_command(parser, _documents, arguments)


def _documents(given: Namespace) -> None:
    if given.step < 1:
        raise ConfigError(f"--step: expected at least 1, got {given.step}")
    config, size, fingerprint = read_run(given.run)
    corpus = prepare(config)
    if fingerprint is not None and fingerprint != corpus.fingerprint:
        raise DataError(
            f"data: {given.run} was trained on other text ({fingerprint[:8]}) than is found now "
            f"({corpus.fingerprint[:8]}); ask where it was trained"
        )
    for piece in pieces_in_step(corpus, config, given.step - 1, size):
        sys.stdout.write(json.dumps(asdict(piece)) + "\n")


if __name__ == "__main__":
    # So that `| head` ends it without a word.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.exit(main())

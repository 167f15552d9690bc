"""`python -m attnres.commands.documents --run RUN --step N`: which documents an optimizer step was made of.

The batch of a step is a function of the seed and the step, so nothing has to be recorded during training: the answer
follows from the run's configuration and its corpus.
"""

import json
import signal
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from attnres.commands.door import parsed_command
from attnres.config import build
from attnres.data.config import DataConfig
from attnres.data.corpus.build import prepare
from attnres.data.corpus.corpus import Corpus
from attnres.data.windows.datamodule import documents_in_step
from attnres.errors import ConfigError, DataError


def spans(corpus: Corpus, config: DataConfig, step: int, global_batch_size: int) -> Iterator[dict[str, Any]]:
    """The pieces of documents that an optimizer step reads, sample by sample.

    Args:
        corpus: Prepared corpus.
        config: The run's data configuration.
        step: Optimizer step, counting from 0.
        global_batch_size: Windows in one optimizer step.

    Yields:
        `sample` (place in the global batch), `window` (its `sample_ids`), `document`, `name`, and, in tokens, `at` and
        `tokens` (where in the window's inputs the piece begins, and how long it is) and `offset` (of its first token
        in the document). A document that gives only the window's last target has 0 tokens.
    """
    length = config.sequence_length
    for sample, (window, documents) in enumerate(documents_in_step(corpus, config, step, global_batch_size).items()):
        first = window * length
        for document, name in zip(documents, corpus.names_of(documents), strict=True):
            start, end = int(corpus.starts[document]), int(corpus.starts[document] + corpus.lengths[document])
            begin = max(start, first)
            yield {
                "sample": sample,
                "window": window,
                "document": document,
                "name": name,
                "at": begin - first,
                "tokens": min(end, first + length) - begin,
                "offset": begin - start,
            }


def read_run(folder: Path) -> tuple[DataConfig, int, str | None]:
    """The data configuration, the global batch size and the data fingerprint of a run.

    Args:
        folder: A run folder, or its path without the hash at the end.

    Raises:
        ConfigError: It is not one, or its name without the hash is not unique.
    """
    if not folder.is_dir():
        found = sorted(folder.parent.glob(f"{folder.name}-*/config.yaml"))
        if len(found) != 1:
            raise ConfigError(f"--run: {len(found)} runs match {folder}; give one run folder")
        folder = found[0].parent
    try:
        settings = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        config = build(DataConfig, settings["data"], "data")
        size = int(settings["trainer"]["global_batch_size"])
        provenance = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise ConfigError(f"--run: {folder} is not a run folder ({error!r}); give one that train.py printed") from error
    return config, size, provenance.get("hashes", {}).get("data")


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the spans of documents of a step, a line of JSON each; returns the exit code."""
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
    for span in spans(corpus, config, given.step - 1, size):
        sys.stdout.write(json.dumps(span) + "\n")


if __name__ == "__main__":
    # So that `| head` ends it without a word.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.exit(main())

"""`python -m attnres.commands.make_shards`: streams text through a tokenizer into a folder of token shards.

Killed anywhere, the same command goes on; see `attnres/data/README.md`.
"""

import dataclasses
import json
import os
import re
import shlex
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from attnres.commands.door import parsed_command
from attnres.data.config import MIN_VOCAB_SIZE, DataConfig
from attnres.data.corpus.make_shards import Job, ShardsConfig, make_shards, making
from attnres.data.text.sources import log_left_out
from attnres.data.text.streams import FileStream, HubStream, Stream, hub_errors, resolve_revision
from attnres.errors import ConfigError, DataError
from attnres.files.whole_files import read_object, write_text

FINEWEB_EDU = ("HuggingFaceFW/fineweb-edu", "sample-10BT")


def main(arguments: Sequence[str] | None = None) -> int:
    """Makes a folder of token shards, prints its path, returns the exit code."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    command = shlex.join(["python", "-m", "attnres.commands.make_shards", *words])
    return parsed_command(_parser(), lambda given: _make_shards(given, command), words)


def _make_shards(given: Namespace, command: str) -> None:
    # One process per core, each with one thread: faster than the library's own threads.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if given.workers < 1:
        raise ConfigError(f"--workers: expected at least 1, got {given.workers}")
    if given.vocab_size is not None and given.vocab_size < MIN_VOCAB_SIZE:
        raise ConfigError(f"--vocab-size: expected at least {MIN_VOCAB_SIZE}, got {given.vocab_size}")
    config = ShardsConfig(**{field.name: getattr(given, field.name) for field in dataclasses.fields(ShardsConfig)})
    tokenizer = None if given.tokenizer is None else _find_tokenizer(given.tokenizer)
    job = Job(_stream(given), config, tokenizer, given.vocab_size, exclude=tuple(given.exclude))
    sys.stdout.write(f"{make_shards(given.out, job, given.workers, command)}\n")


def _find_tokenizer(given: str) -> str:
    """A path as it is; a hub id such as Qwen/Qwen3-0.6B as the folder that its two files were downloaded to."""
    if Path(given).expanduser().exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", given):
        return given
    from huggingface_hub import snapshot_download

    with hub_errors(f"--tokenizer: {given} is no file here and cannot be read from the hub", "give a tokenizer.json"):
        return snapshot_download(given, allow_patterns=["tokenizer.json", "tokenizer_config.json"])


def _stream(given: Namespace) -> Stream:
    if given.paths:
        chosen = {"paths": tuple(given.paths), "suffixes": tuple(given.suffixes), "text_column": given.text_column}
        files = DataConfig(source="files", **chosen)
        log_left_out(files)
        return FileStream(files)
    name, config = given.hub, given.hub_config
    if name is None:
        name, config = FINEWEB_EDU[0], config or FINEWEB_EDU[1]
    with making(given.out):
        commit = _commit(given.out, name, given.revision)
    return HubStream(name, config, given.hub_split, revision=commit, column=given.text_column)


def _commit(out: Path, name: str, revision: str) -> str:
    """The commit that was begun with, also where a branch has moved on while the work was interrupted."""
    asked = f"{name}@{revision}"
    remembered = out.with_name(f"{out.name}.revision")
    if remembered.is_file():
        try:
            known = read_object(remembered)
        except (OSError, ValueError) as error:
            raise DataError(f"{remembered} is damaged ({error}); delete it and run the same command again") from error
        if isinstance(known.get(asked), str):
            return known[asked]
    commit = resolve_revision(name, revision)
    write_text(remembered, json.dumps({asked: commit}))
    return commit


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m attnres.commands.make_shards",
        description="Stream text through a tokenizer into token shards for data=prepared. Killed, it goes on.",
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder to make")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--hub", help="a Hugging Face data set; default HuggingFaceFW/fineweb-edu, sample-10BT")
    source.add_argument("--paths", nargs="+", help="files (.txt, .jsonl, .json, .csv, .parquet), folders or globs")
    add("--suffixes", nargs="+", default=[], help="which files of a folder are read, such as .md .py, which are text")
    add("--hub-config", help="configuration of the data set")
    add("--hub-split", default="train", help="split of the data set")
    add("--revision", default="main", help="branch, tag or commit of the data set")
    add("--text-column", default="text", help="column or field that holds the text")
    add("--tokenizer", help="a tokenizer.json, a folder with one, or a hub id such as Qwen/Qwen3-0.6B")
    add("--vocab-size", type=int, help="train a byte-level BPE of at most so many entries instead")
    add("--exclude", type=Path, nargs="+", default=[], help="prepared folders whose texts are left out")
    add("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes that tokenise")
    for field in dataclasses.fields(ShardsConfig):
        kind = float if isinstance(field.default, float) else int
        add(f"--{field.name.replace('_', '-')}", type=kind, default=field.default)
    return parser


if __name__ == "__main__":
    sys.exit(main())

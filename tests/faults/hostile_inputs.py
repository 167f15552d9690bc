"""Hostile files beside checkpoints: links in a run's own folder, tables, text, tokenizers, corpora, configuration."""

import io
import json
import pickle
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from attnres.data.corpus.manifest import manifest_sha256
from attnres.data.corpus.shards import digest
from tests.faults.hostile import (
    PROBE_WORDS,
    SECRET,
    Case,
    Change,
    Code,
    Prepare,
    Trap,
    deep,
    huge,
    replace_by_link,
    write,
)
from tests.faults.scenarios import own_cache
from tests.faults.world import fork


# Links in the run's own folder, which somebody else may be able to write to.
def _own_link(name: str) -> Prepare:
    def prepare(trap: Trap) -> tuple[str, list[str]]:
        folder = trap.world.trained
        (folder / "complete.json").unlink()
        shutil.rmtree(trap.world.step(6))
        replace_by_link(folder / name, trap)
        return "train", []

    return prepare


def _probe_link(name: str) -> Prepare:
    def prepare(trap: Trap) -> tuple[str, list[str]]:
        # The folder's name follows from the paths of this world, so a first probe makes it.
        trap.world.run("probe", *PROBE_WORDS)
        (folder,) = (p for p in trap.world.runs.glob("probe_*") if (p / ".lock").exists() and p.name != _first(trap))
        replace_by_link(folder / name, trap)
        return "probe", [*PROBE_WORDS]

    return prepare


def _first(trap: Trap) -> str:
    return next((trap.world.base / "worlds" / "whole" / "runs").glob("probe_*")).name


def _report(change: Change) -> Prepare:
    def prepare(trap: Trap) -> tuple[str, list[str]]:
        # Pandas and pyarrow start threads, which a process that forks must not have.
        fork(partial(change, trap, trap.world.probed), trap.folder / "logs" / "prepare.log").wait()
        return "report", [str(trap.world.probed)]

    return prepare


_MARKUP = "<script>alert(1)</script><img src=x onerror=alert(1)>[x](javascript:alert(1))\x1b[31m|{{ 7*7 }}"


def _markup_in_tables(trap: Trap, folder: Path) -> None:
    for name in ("cells.csv", "routing.csv", "contrasts.csv"):
        frame = pd.read_csv(folder / name)
        column = "baseline" if name == "contrasts.csv" else "model"
        first = frame[column].iloc[0]
        frame[column] = frame[column].where(frame[column] != first, _MARKUP)
        frame.to_csv(folder / name, index=False)


def _markup_in_summary(trap: Trap, folder: Path) -> None:
    path = folder / "summary.json"
    record = json.loads(path.read_text())
    record |= {"title": _MARKUP, "command": f"python probe.py hf_token={SECRET} {_MARKUP}"}
    record["models"][0] |= {"name": _MARKUP, "path": _MARKUP}
    record["provenance"]["note"] = _MARKUP
    path.write_text(json.dumps(record))


def _pickled_table(trap: Trap, folder: Path) -> None:
    (folder / "effects.parquet").write_bytes(pickle.dumps(Code()))


# Text, tokenizer and cached shards.
def _text(name: str, content: Callable[[Trap], bytes], *more: str) -> Prepare:
    def prepare(trap: Trap) -> tuple[str, list[str]]:
        folder = Path(shutil.copytree(trap.world.base / "text", trap.folder / "text"))
        (folder / name).write_bytes(content(trap))
        return "train", [f"data.paths=[{folder}]", f"data.cache_dir={trap.world.runs}/cache", "name=text", *more]

    return prepare


def _tokenizer(content: Callable[[Trap, dict[str, Any]], bytes]) -> Prepare:
    def prepare(trap: Trap) -> tuple[str, list[str]]:
        stored = json.loads((trap.step() / "model" / "tokenizer.json").read_text())
        path = trap.folder / "tokenizer.json"
        path.write_bytes(content(trap, stored))
        return "train", [f"data.tokenizer={path}", f"data.cache_dir={trap.world.runs}/cache", "name=tokenizer"]

    return prepare


def _large_id(trap: Trap, stored: dict[str, Any]) -> bytes:
    stored["model"]["vocab"]["zzzz"] = 2**31
    return json.dumps(stored).encode()


def _bad_tokenizer_config(trap: Trap) -> tuple[str, list[str]]:
    stored = json.loads((trap.step() / "model" / "tokenizer.json").read_text())
    path = trap.folder / "tokenizer.json"
    path.write_text(json.dumps(stored))
    (trap.folder / "tokenizer_config.json").write_text(deep())
    return "train", [f"data.tokenizer={path}", f"data.cache_dir={trap.world.runs}/cache", "name=tokenizer"]


def _corpus(change: Change, command: str = "train") -> Prepare:
    def prepare(trap: Trap) -> tuple[str, list[str]]:
        own_cache(trap.world)
        for manifest in trap.world.cache.glob("*/manifest.json"):
            change(trap, manifest.parent)
        return command, ["name=corpus"] if command == "train" else [*PROBE_WORDS]

    return prepare


def _sealed_corpus(change: Callable[[Trap, Path, dict[str, Any]], None]) -> Change:
    def act(trap: Trap, folder: Path) -> None:
        record = json.loads((folder / "manifest.json").read_text())
        change(trap, folder, record)
        record["sha256_of_the_rest"] = manifest_sha256(record)
        (folder / "manifest.json").write_text(json.dumps(record))

    return act


def _corpus_escape(trap: Trap, folder: Path, record: dict[str, Any]) -> None:
    record["files"]["../../outside/precious.txt"] = digest(trap.outside / "precious.txt")


def _corpus_large_ids(trap: Trap, folder: Path, record: dict[str, Any]) -> None:
    path = folder / "train.tokens"
    ids = np.fromfile(path, record["dtype"])
    ids[:] = np.iinfo(ids.dtype).max
    path.write_bytes(ids.tobytes())
    record["files"]["train.tokens"] = digest(path)


def _corpus_claims(trap: Trap, folder: Path, record: dict[str, Any]) -> None:
    record["vocab_size"] = 2**31


def _pickled_shard(trap: Trap, folder: Path) -> None:
    (folder / "train.tokens").write_bytes(pickle.dumps(Code()))


def _object_array(trap: Trap, folder: Path) -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.array([Code()], dtype=object), allow_pickle=True)
    (folder / "documents.parquet").write_bytes(buffer.getvalue())


# Configuration from elsewhere.
def _config_folder(text: str) -> Prepare:
    def prepare(trap: Trap) -> tuple[str, list[str]]:
        folder = trap.folder / "conf" / "experiment"
        folder.mkdir(parents=True)
        (folder / "evil.yaml").write_text("# @package _global_\n" + text)
        return "train", ["+experiment=evil", "--config-dir", str(trap.folder / "conf")]

    return prepare


def _secrets(trap: Trap) -> tuple[str, list[str]]:
    return "train", ["name=secrets", f"data.obtain='hf download x --token {SECRET}'"]


def _secret_key(trap: Trap) -> tuple[str, list[str]]:
    return "train", [f"+hf_token={SECRET}"]


def _rerun(trap: Trap) -> tuple[str, list[str]]:
    path = trap.folder / "config.pickle"
    path.write_bytes(pickle.dumps(Code()))
    return "train", ["--experimental-rerun", str(path)]


CASES: tuple[Case, ...] = (
    *(
        Case("own run folder", f"{name} is a link", _own_link(name), codes, name == "checkpoints")
        for name, codes in (
            ("checkpoints", (2,)), ("metrics.csv", (2,)), ("config.yaml", (2,)), (".tmp-config.yaml", (0, 2)),
            ("wandb", (2,)), ("provenance.json", (2,)),
        )
    ),
    *(
        Case("own probe folder", f"{name} is a link", _probe_link(name), (2,))
        for name in ("figures", "cells.csv")
    ),
    Case("report DIR", "markup in the tables", _report(_markup_in_tables), (0, 3), True),
    Case("report DIR", "markup and a secret in the summary", _report(_markup_in_summary), (0,), True),
    Case("report DIR", "pickle as a table", _report(_pickled_table), (3,)),
    Case("report DIR", "deeply nested summary.json", _report(write("summary.json", deep)), (3,)),
    Case("report DIR", "huge preregistration.json", _report(write("preregistration.json", huge)), (3,)),
    Case("report DIR", "report.html is a link",
         _report(lambda trap, folder: replace_by_link(folder / "report.html", trap)), (2,)),
    Case("data files", "pickle as .parquet", _text("x.parquet", lambda t: pickle.dumps(Code())), (3,)),
    Case("data files", "pickle as .txt", _text("x.txt", lambda t: pickle.dumps(Code())), (3,)),
    Case("data files", "a name with a command in it",
         _text("$(touch canary);`touch canary`.txt", lambda t: b"alpha beta gamma " * 40), (0,)),
    Case("data files", "markup as text", _text("m.txt", lambda t: _MARKUP.encode() * 20), (0,)),
    Case("tokenizer.json", "an id of 2^31", _tokenizer(_large_id), (3,), True),
    Case("tokenizer.json", "nested deeply", _tokenizer(lambda t, s: deep().encode()), (3,)),
    Case("tokenizer.json", "pickle", _tokenizer(lambda t, s: pickle.dumps(Code())), (3,)),
    Case("tokenizer.json", "empty vocabulary", _tokenizer(lambda t, s: json.dumps(
        s | {"added_tokens": [], "model": s["model"] | {"vocab": {}, "merges": []}}).encode()), (3,)),
    Case("tokenizer.json", "nested tokenizer_config.json beside it", _bad_tokenizer_config, (0, 3)),
    *(
        Case(f"cached corpus, {command}", payload, _corpus(change, command), (3,))
        for command in ("train", "probe")
        for payload, change in (
            ("pickle as a shard", _pickled_shard),
            ("array of objects as the table", _object_array),
            ("deeply nested manifest", write("manifest.json", deep)),
            ("manifest that climbs out", _sealed_corpus(_corpus_escape)),
            ("ids beyond the vocabulary", _sealed_corpus(_corpus_large_ids)),
            ("vocabulary of 2^31", _sealed_corpus(_corpus_claims)),
        )
        if (command, payload) != ("probe", "ids beyond the vocabulary")
    ),
    Case("configuration", "python tag in YAML",
         _config_folder("name: !!python/object/apply:tests.faults.canary.touch []\n"), (2,)),
    Case("configuration", "_target_ in an experiment",
         _config_folder("model:\n  _target_: tests.faults.canary.touch\n"), (2,)),
    Case("configuration", "a Hydra callback in an experiment", _config_folder(
        "hydra:\n  callbacks:\n    x:\n      _target_: tests.faults.canary.touch\n"), (2,), True),
    Case("configuration", "a logging factory in an experiment", _config_folder(
        "hydra:\n  job_logging:\n    version: 1\n    handlers:\n      x:\n        (): "
        "tests.faults.canary.touch\n"), (2,)),
    Case("configuration", "pickle to run again", _rerun, (2,)),
    Case("logs and files", "secrets in the environment and in a command", _secrets, (0,), True,
         (("HF_TOKEN", SECRET), ("WANDB_API_KEY", SECRET), ("AWS_SECRET_ACCESS_KEY", SECRET))),
    Case("logs and files", "a secret as an unknown key", _secret_key, (2,)),
)  # fmt: skip

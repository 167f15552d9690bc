"""Hostile files against every entry point: nothing of theirs runs, nothing is written outside the run folder."""

import io
import json
import os
import pickle
import shutil
import struct
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from attnres.data.corpus.manifest import manifest_sha256
from attnres.data.corpus.shards import digest
from attnres.files.hashes import sha256_of
from tests.faults.runner import Outcome
from tests.faults.scenarios import own_cache
from tests.faults.world import Base, fork

ROW = "malicious input"
MOST_MIB = 1500
SECRET = "hf_QwErTyUiOpAsDfGhJkLzXcVb"


@dataclass(frozen=True)
class Case:
    """One payload at one entry point.

    Attributes:
        entry: which door.
        payload: what comes in.
        prepare: puts it there; returns the command and the arguments beyond the usual ones.
        codes: exit codes that are right; 0 where the payload is to be ignored.
        short: part of the short form.
    """

    entry: str
    payload: str
    prepare: Callable[["Trap"], tuple[str, list[str]]]
    codes: tuple[int, ...]
    short: bool = False
    environment: tuple[tuple[str, str], ...] = ()


# What a probe does after its checks is not what is tested here.
_PART = ("probe.families=embedding", "probe.sublayers=mlp", "probe.schedules=[uniform]")


class Trap:
    """A world with a run from elsewhere, a canary, and a folder that nobody may touch."""

    def __init__(self, base: Base) -> None:
        self.world = base.world("hostile", "probed")
        self.folder = self.world.folder
        self.canary = self.folder / "canary"
        self.outside = self.folder / "outside"
        self.outside.mkdir()
        (self.outside / "precious.txt").write_text("precious")
        self.evil = {
            kind: Path(shutil.copytree(next(self.world.runs.glob(f"{kind}-*")), self.folder / "evil" / kind))
            for kind in ("attnres", "vanilla")
        }

    def step(self, kind: str = "attnres") -> Path:
        return self.evil[kind] / "checkpoints" / "step_00000006"

    def seal(self, kind: str = "attnres") -> None:
        """A manifest that agrees with the files, as whoever changed them would write it."""
        step = self.step(kind)
        files = {
            p.relative_to(step).as_posix(): {"sha256": sha256_of(p), "bytes": p.stat().st_size}
            for p in sorted(step.rglob("*"))
            if p.is_file() and p.name != "manifest.json"
        }
        (step / "manifest.json").write_text(json.dumps({"files": files}, indent=2, sort_keys=True) + "\n")

    def snapshot(self) -> dict[str, Any]:
        """Everything outside the folders that a command may write to."""
        mine = (self.world.runs, self.folder / "logs", self.world.cache)
        return {
            str(path): path.lstat().st_mtime_ns if path.is_file() else 0
            for path in self.folder.rglob("*")
            if not any(path.is_relative_to(place) for place in mine)
        }


def play(base: Base, case: Case) -> Outcome:
    """Runs one case and looks for what it may have done."""
    began = time.monotonic()
    trap = Trap(base)
    command, more = case.prepare(trap)
    before = trap.snapshot()
    only = more if command == "report" else None
    environment = {"CANARY": str(trap.canary)} | dict(case.environment)
    child = trap.world.run(command, *([] if only else more), only=only, environment=environment)
    told, wrong = child.told.strip(), []
    if child.code not in case.codes:
        wrong.append(f"exit code {child.code}: {told[-700:]}")
    if trap.canary.exists():
        wrong.append("the payload ran")
    changed = sorted(set(trap.snapshot().items()) ^ set(before.items()))
    if changed:
        wrong.append(f"touched outside the run folder: {changed[:3]}")
    if (trap.outside / "precious.txt").read_text() != "precious":
        wrong.append("wrote through a link")
    if "Traceback" in told or (child.code > 0 and sum(w.startswith("error: ") for w in told.splitlines()) != 1):
        wrong.append(f"not one line: {told[-700:]}")
    if child.peak_mib > MOST_MIB:
        wrong.append(f"{child.peak_mib:.0f} MiB of memory")
    if SECRET in told:
        wrong.append("a secret in the log")
    for path in trap.world.runs.rglob("*"):
        # Of a report, what was drawn: the secret is in the summary that it was drawn from.
        if command == "report" and not path.name.startswith("report."):
            continue
        if path.is_file() and not path.is_symlink() and SECRET.encode() in path.read_bytes():
            wrong.append(f"a secret in {path.relative_to(trap.world.runs)}")
            break
    if command == "report" and child.code == 0:
        html = (Path(more[0]) / "report.html").read_text()
        wrong += [f"not escaped: {text}" for text in ("<script>alert", "<img src=x", '="javascript:') if text in html]
    expected = f"exit {' or '.join(map(str, case.codes))}, nothing ran"
    found = f"exit {child.code}, {'nothing ran' if not wrong else 'see summary.json'}"
    name = f"{case.payload} -> {case.entry}"
    return Outcome("hostile", ROW, name, expected, found, "; ".join(wrong), time.monotonic() - began)


class _Runs:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (self.command,)


def _payload(trap: Trap) -> _Runs:
    return _Runs(f"touch {trap.canary}")


def _deep() -> str:
    return '{"a":' + "[" * 100_000 + "]" * 100_000 + "}"


def _huge() -> str:
    return '{"a": "' + "x" * (33 * 2**20) + '"}'


# Where each kind of checkpoint goes in.
def _resume(trap: Trap) -> tuple[str, list[str]]:
    return "train", [f"resume={trap.step()}", "name=other"]


def _ckpt(trap: Trap) -> tuple[str, list[str]]:
    return "probe", [f"ckpt={trap.step()}", *_PART]


def _baseline(trap: Trap) -> tuple[str, list[str]]:
    return "probe", [f"baseline={trap.step('vanilla')}", *_PART]


def _base(trap: Trap) -> tuple[str, list[str]]:
    return "train", [
        f"init.base={trap.step('vanilla')}",
        "init.wrap=uniform",
        "+model.attnres_exact_uniform=true",
        "name=other",
    ]


_DOORS = {"train resume=": (_resume, "attnres"), "probe ckpt=": (_ckpt, "attnres"),
          "probe baseline=": (_baseline, "vanilla"), "train init.base=": (_base, "vanilla")}  # fmt: skip


def _at(door: str, change: Callable[[Trap, Path], None], seal: bool = True) -> Callable[[Trap], tuple[str, list[str]]]:
    go, kind = _DOORS[door]

    def prepare(trap: Trap) -> tuple[str, list[str]]:
        change(trap, trap.step(kind))
        if seal:
            trap.seal(kind)
        return go(trap)

    return prepare


def _pickle_in_zip(trap: Trap, step: Path) -> None:
    torch.save({"state_dict": _payload(trap)}, step / "training.ckpt")


def _plain_pickle(trap: Trap, step: Path) -> None:
    (step / "training.ckpt").write_bytes(pickle.dumps(_payload(trap)))


def _zip_bomb(trap: Trap, step: Path) -> None:
    with zipfile.ZipFile(step / "training.ckpt") as archive:
        members = {m.filename: archive.read(m) for m in archive.infolist()}
    with zipfile.ZipFile(step / "training.ckpt", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content if not name.endswith("data/0") else bytes(32 * 2**20))


def _repeated_elements(trap: Trap, step: Path) -> None:
    state = torch.load(step / "training.ckpt", weights_only=True)
    name = next(iter(state["state_dict"]))
    state["state_dict"][name] = torch.zeros(1).expand(2**20, 2**20)
    torch.save(state, step / "training.ckpt")


def _wrong_loops(trap: Trap, step: Path) -> None:
    state = torch.load(step / "training.ckpt", weights_only=True)
    state["loops"] = {"fit_loop": "__import__('os').system('touch canary')"}
    torch.save(state, step / "training.ckpt")


def _wrong_optimizer(trap: Trap, step: Path) -> None:
    state = torch.load(step / "training.ckpt", weights_only=True)
    state["optimizer_states"] = [{"state": {}, "param_groups": []}]
    torch.save(state, step / "training.ckpt")


def _pickled_weights(trap: Trap, step: Path) -> None:
    (step / "model" / "model.safetensors").unlink()
    torch.save({"x": _payload(trap)}, step / "model" / "pytorch_model.bin")


def _config(**changes: Any) -> Callable[[Trap, Path], None]:
    def change(trap: Trap, step: Path) -> None:
        path = step / "model" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        for name in ("evil.py", "modeling_evil.py", "configuration_evil.py"):
            (step / "model" / name).write_text(f"open({str(trap.canary)!r}, 'w').close()")

    return change


def _stored_config(trap: Trap, step: Path) -> None:
    path = step / "model" / "training.json"
    record = json.loads(path.read_text())
    record["config"]["model"] = {"_target_": "os.system", "_args_": [f"touch {trap.canary}"]}
    path.write_text(json.dumps(record))


def _stored_data_config(trap: Trap, step: Path) -> None:
    path = step / "model" / "data.json"
    record = json.loads(path.read_text())
    record["config"] |= {"_target_": "os.system", "obtain": f"touch {trap.canary}"}
    path.write_text(json.dumps(record))


def _file(name: str, content: Callable[[], str]) -> Callable[[Trap, Path], None]:
    return lambda trap, step: (step / name).write_text(content()) and None


def _manifest(name: str) -> Callable[[Trap, Path], None]:
    def change(trap: Trap, step: Path) -> None:
        path = step / "manifest.json"
        record = json.loads(path.read_text())
        target = trap.outside / "precious.txt"
        record["files"][name.format(outside=trap.outside)] = {"sha256": sha256_of(target), "bytes": 8}
        path.write_text(json.dumps(record, indent=2) + "\n")

    return change


def _index(trap: Trap, step: Path) -> None:
    (step / "model" / "model.safetensors").rename(trap.outside / "weights.safetensors")
    mapping = {"weight_map": {"model.norm.weight": "../../../../../outside/weights.safetensors"}}
    (step / "model" / "model.safetensors.index.json").write_text(json.dumps(mapping))


def _link_out(name: str) -> Callable[[Trap, Path], None]:
    def change(trap: Trap, step: Path) -> None:
        target = trap.outside / Path(name).name
        (step / name).rename(target)
        (step / name).symlink_to(target)

    return change


def _fifo(trap: Trap, step: Path) -> None:
    (step / "model" / "training.json").unlink()
    os.mkfifo(step / "model" / "training.json")
    path = step / "manifest.json"
    record = json.loads(path.read_text())
    record["files"]["model/training.json"] = {"sha256": sha256_of(trap.outside / "precious.txt"), "bytes": 0}
    path.write_text(json.dumps(record, indent=2) + "\n")


def _safetensors(header: bytes, length: int | None = None) -> Callable[[Trap, Path], None]:
    def change(trap: Trap, step: Path) -> None:
        size = struct.pack("<Q", len(header) if length is None else length)
        (step / "model" / "model.safetensors").write_bytes(size + header)

    return change


_BIG_SHAPE = json.dumps(
    {"model.norm.weight": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}
).encode()  # fmt: skip


# Links in the run's own folder, which somebody else may be able to write to.
def _own_link(name: str) -> Callable[[Trap], tuple[str, list[str]]]:
    def prepare(trap: Trap) -> tuple[str, list[str]]:
        folder = trap.world.trained
        (folder / "complete.json").unlink()
        shutil.rmtree(trap.world.step(6))
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
            path.symlink_to(trap.outside)
        else:
            path.unlink(missing_ok=True)
            path.symlink_to(trap.outside / "precious.txt")
        return "train", []

    return prepare


def _probe_link(name: str) -> Callable[[Trap], tuple[str, list[str]]]:
    def prepare(trap: Trap) -> tuple[str, list[str]]:
        # The folder's name follows from the paths of this world, so a first probe makes it.
        trap.world.run("probe", *_PART)
        (folder,) = (p for p in trap.world.runs.glob("probe_*") if (p / ".lock").exists() and p.name != _first(trap))
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
            path.symlink_to(trap.outside)
        else:
            path.unlink(missing_ok=True)
            path.symlink_to(trap.outside / "precious.txt")
        return "probe", [*_PART]

    return prepare


def _first(trap: Trap) -> str:
    return next((trap.world.base / "worlds" / "whole" / "runs").glob("probe_*")).name


def _report(change: Callable[[Trap, Path], None]) -> Callable[[Trap], tuple[str, list[str]]]:
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


def _link(path: Path, target: Path) -> None:
    path.unlink()
    path.symlink_to(target)


def _pickled_table(trap: Trap, folder: Path) -> None:
    (folder / "effects.parquet").write_bytes(pickle.dumps(_payload(trap)))


def _many_rows(trap: Trap, folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    frame = pd.read_parquet(folder / "effects.parquet")
    constant = pa.Table.from_pandas(frame.iloc[[0] * 1_000_000], preserve_index=False)
    with pq.ParquetWriter(folder / "effects.parquet", constant.schema, compression="zstd") as writer:
        for _ in range(101):
            writer.write_table(constant)


def _write(name: str, content: Callable[[], str]) -> Callable[[Trap, Path], None]:
    return lambda trap, folder: (folder / name).write_text(content()) and None


# Text, tokenizer and cached shards.
def _text(name: str, content: Callable[[Trap], bytes], *more: str) -> Callable[[Trap], tuple[str, list[str]]]:
    def prepare(trap: Trap) -> tuple[str, list[str]]:
        folder = Path(shutil.copytree(trap.world.base / "text", trap.folder / "text"))
        (folder / name).write_bytes(content(trap))
        return "train", [f"data.paths=[{folder}]", f"data.cache_dir={trap.world.runs}/cache", "name=text", *more]

    return prepare


def _tokenizer(content: Callable[[Trap, dict[str, Any]], bytes]) -> Callable[[Trap], tuple[str, list[str]]]:
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
    (trap.folder / "tokenizer_config.json").write_text(_deep())
    return "train", [f"data.tokenizer={path}", f"data.cache_dir={trap.world.runs}/cache", "name=tokenizer"]


def _corpus(change: Callable[[Trap, Path], None], command: str = "train") -> Callable[[Trap], tuple[str, list[str]]]:
    def prepare(trap: Trap) -> tuple[str, list[str]]:
        own_cache(trap.world)
        for manifest in trap.world.cache.glob("*/manifest.json"):
            change(trap, manifest.parent)
        return command, ["name=corpus"] if command == "train" else [*_PART]

    return prepare


def _sealed_corpus(change: Callable[[Trap, Path, dict[str, Any]], None]) -> Callable[[Trap, Path], None]:
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
    record["vocab_size"] = 2**40


def _pickled_shard(trap: Trap, folder: Path) -> None:
    (folder / "train.tokens").write_bytes(pickle.dumps(_payload(trap)))


def _object_array(trap: Trap, folder: Path) -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.array([_payload(trap)], dtype=object), allow_pickle=True)
    (folder / "documents.parquet").write_bytes(buffer.getvalue())


# Configuration from elsewhere.
def _config_folder(text: str) -> Callable[[Trap], tuple[str, list[str]]]:
    def prepare(trap: Trap) -> tuple[str, list[str]]:
        folder = trap.folder / "conf" / "experiment"
        folder.mkdir(parents=True)
        (folder / "evil.yaml").write_text("# @package _global_\n" + text.replace("CANARY", str(trap.canary)))
        return "train", ["+experiment=evil", "--config-dir", str(trap.folder / "conf")]

    return prepare


def _secrets(trap: Trap) -> tuple[str, list[str]]:
    return "train", ["name=secrets", f"data.obtain='hf download x --token {SECRET}'"]


def _secret_key(trap: Trap) -> tuple[str, list[str]]:
    return "train", [f"+hf_token={SECRET}"]


def _rerun(trap: Trap) -> tuple[str, list[str]]:
    path = trap.folder / "config.pickle"
    path.write_bytes(pickle.dumps(_payload(trap)))
    return "train", ["--experimental-rerun", str(path)]


_CHECKPOINTS: tuple[tuple[str, Callable[[Trap, Path], None], bool, dict[str, tuple[int, ...]]], ...] = (
    # payload, change, whether the manifest is made to agree, door -> exit codes
    ("pickle in a torch archive", _pickle_in_zip, True, {"train resume=": (4,), "probe ckpt=": (0,)}),
    ("plain pickle as training.ckpt", _plain_pickle, True, {"train resume=": (4,)}),
    ("compressed torch archive (zip bomb)", _zip_bomb, True, {"train resume=": (4,)}),
    ("tensor of stride 0 that claims 4 TiB", _repeated_elements, True, {"train resume=": (4,)}),
    ("loop state that is none", _wrong_loops, True, {"train resume=": (4,)}),
    ("optimizer state of another optimizer", _wrong_optimizer, True, {"train resume=": (4,)}),
    ("pickle in pytorch_model.bin", _pickled_weights, True, {d: (4,) for d in _DOORS if d != "train resume="}),
    ("auto_map with code beside it", _config(auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"},
     trust_remote_code=True), True, {d: (0,) for d in _DOORS if d != "train resume="}),
    ("attention kernel from the hub", _config(attn_implementation="owner/kernel", _attn_implementation="owner/kernel"),
     True, {"probe ckpt=": (0,)}),
    ("_target_ in config.json", _config(_target_="os.system", model_type="evil"), True,
     {d: (4,) for d in _DOORS if d != "train resume="}),
    ("10^9 layers", _config(num_hidden_layers=10**9, layer_types=None), True,
     {d: (4,) for d in _DOORS if d != "train resume="}),
    ("head_dim of 2^34", _config(head_dim=2**34), True, {d: (4,) for d in _DOORS if d != "train resume="}),
    ("vocabulary of 2^40", _config(vocab_size=2**40), True, {d: (4,) for d in _DOORS if d != "train resume="}),
    ("activation that is an expression", _config(hidden_act="__import__('os').system('touch canary')"), True,
     {"probe ckpt=": (4,)}),
    ("_target_ in the stored configuration", _stored_config, True, {"train resume=": (4,)}),
    ("_target_ and a command in data.json", _stored_data_config, True, {"probe ckpt=": (2,)}),
    *((f"deeply nested {name}", _file(f"model/{name}", _deep), True,
       {d: (4,) for d in _DOORS if name != "config.json" or d != "train resume="})
      for name in ("config.json", "training.json", "data.json")),
    ("huge config.json", _file("model/config.json", _huge), True, {"probe ckpt=": (4,)}),
    ("deeply nested manifest", _file("manifest.json", _deep), False, {d: (4,) for d in _DOORS}),
    ("manifest that climbs out", _manifest("../../../../outside/precious.txt"), False, {d: (4,) for d in _DOORS}),
    ("manifest with an absolute path", _manifest("{outside}/precious.txt"), False, {d: (4,) for d in _DOORS}),
    ("safetensors index that climbs out", _index, True, {"probe ckpt=": (4,)}),
    ("weights linked from outside", _link_out("model/model.safetensors"), True, {d: (4,) for d in _DOORS}),
    ("training.ckpt linked from outside", _link_out("training.ckpt"), True, {"train resume=": (4,)}),
    ("pipe in place of a file", _fifo, False, {d: (4,) for d in _DOORS if d != "probe baseline="}),
    ("safetensors header of 2^60 bytes", _safetensors(b"{}", 2**60), True,
     {d: (4,) for d in _DOORS if d != "train resume="}),
    ("safetensors shape of 2^40", _safetensors(_BIG_SHAPE), True, {d: (4,) for d in _DOORS if d != "train resume="}),
    ("safetensors header nested deeply", _safetensors(_deep().encode()), True, {"probe ckpt=": (4,)}),
)  # fmt: skip

_SHORT = {"pickle in a torch archive", "compressed torch archive (zip bomb)", "manifest that climbs out",
          "head_dim of 2^34", "weights linked from outside"}  # fmt: skip

CASES: tuple[Case, ...] = (
    *(
        Case(door, payload, _at(door, change, seal), codes, payload in _SHORT and codes != (0,))
        for payload, change, seal, doors in _CHECKPOINTS
        for door, codes in doors.items()
    ),
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
    Case("report DIR", "table of 101 million rows", _report(_many_rows), (3,)),
    Case("report DIR", "deeply nested summary.json", _report(_write("summary.json", _deep)), (3,)),
    Case("report DIR", "huge preregistration.json", _report(_write("preregistration.json", _huge)), (3,)),
    Case("report DIR", "report.html is a link",
         _report(lambda trap, folder: _link(folder / "report.html", trap.outside / "precious.txt")), (2,)),
    Case("data files", "deeply nested .jsonl", _text("x.jsonl", lambda t: _deep().encode()), (3,)),
    Case("data files", "pickle as .parquet", _text("x.parquet", lambda t: pickle.dumps(_payload(t))), (3,)),
    Case("data files", "pickle as .txt", _text("x.txt", lambda t: pickle.dumps(_payload(t))), (3,)),
    Case("data files", "a name with a command in it",
         _text("$(touch canary);`touch canary`.txt", lambda t: b"alpha beta gamma " * 40), (0,)),
    Case("data files", "markup as text", _text("m.txt", lambda t: _MARKUP.encode() * 20), (0,)),
    Case("tokenizer.json", "an id of 2^31", _tokenizer(_large_id), (3,), True),
    Case("tokenizer.json", "nested deeply", _tokenizer(lambda t, s: _deep().encode()), (3,)),
    Case("tokenizer.json", "pickle", _tokenizer(lambda t, s: pickle.dumps(_payload(t))), (3,)),
    Case("tokenizer.json", "empty vocabulary", _tokenizer(lambda t, s: json.dumps(
        s | {"added_tokens": [], "model": s["model"] | {"vocab": {}, "merges": []}}).encode()), (3,)),
    Case("tokenizer.json", "nested tokenizer_config.json beside it", _bad_tokenizer_config, (0, 3)),
    *(
        Case(f"cached corpus, {command}", payload, _corpus(change, command), (3,))
        for command in ("train", "probe")
        for payload, change in (
            ("pickle as a shard", _pickled_shard),
            ("array of objects as the table", _object_array),
            ("deeply nested manifest", _write("manifest.json", _deep)),
            ("manifest that climbs out", _sealed_corpus(_corpus_escape)),
            ("ids beyond the vocabulary", _sealed_corpus(_corpus_large_ids)),
            ("vocabulary of 2^40", _sealed_corpus(_corpus_claims)),
        )
        if (command, payload) != ("probe", "ids beyond the vocabulary")
    ),
    Case("configuration", "python tag in YAML",
         _config_folder("name: !!python/object/apply:os.system ['touch CANARY']\n"), (2,)),
    Case("configuration", "_target_ in an experiment",
         _config_folder("model:\n  _target_: os.system\n  _args_: ['touch CANARY']\n"), (2,)),
    Case("configuration", "a Hydra callback in an experiment", _config_folder(
        "hydra:\n  callbacks:\n    x:\n      _target_: os.system\n      command: touch CANARY\n"), (2,), True),
    Case("configuration", "a logging factory in an experiment", _config_folder(
        "hydra:\n  job_logging:\n    version: 1\n    handlers:\n      x:\n        (): os.system\n"
        "        command: touch CANARY\n"), (2,)),
    Case("configuration", "pickle to run again", _rerun, (2,)),
    Case("logs and files", "secrets in the environment and in a command", _secrets, (0,), True,
         (("HF_TOKEN", SECRET), ("WANDB_API_KEY", SECRET), ("AWS_SECRET_ACCESS_KEY", SECRET))),
    Case("logs and files", "a secret as an unknown key", _secret_key, (2,)),
)  # fmt: skip

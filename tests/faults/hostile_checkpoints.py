"""Hostile checkpoints, at every door through which a checkpoint comes in."""

import json
import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch

from attnres.files.hashes import sha256_of
from tests.faults.hostile import PROBE_WORDS, Case, Change, Code, Prepare, Trap, deep, huge, write


# Where each kind of checkpoint goes in.
def _resume(trap: Trap) -> tuple[str, list[str]]:
    return "train", [f"resume={trap.step()}", "name=other"]


def _ckpt(trap: Trap) -> tuple[str, list[str]]:
    return "probe", [f"ckpt={trap.step()}", *PROBE_WORDS]


def _baseline(trap: Trap) -> tuple[str, list[str]]:
    return "probe", [f"baseline={trap.step('vanilla')}", *PROBE_WORDS]


def _base(trap: Trap) -> tuple[str, list[str]]:
    return "train", [
        f"init.base={trap.step('vanilla')}",
        "init.wrap=uniform",
        "+model.attnres_exact_uniform=true",
        "name=other",
    ]


_DOORS = {"train resume=": (_resume, "attnres"), "probe ckpt=": (_ckpt, "attnres"),
          "probe baseline=": (_baseline, "vanilla"), "train init.base=": (_base, "vanilla")}  # fmt: skip


def _at(door: str, change: Change, seal: bool = True) -> Prepare:
    go, kind = _DOORS[door]

    def prepare(trap: Trap) -> tuple[str, list[str]]:
        change(trap, trap.step(kind))
        if seal:
            trap.seal(kind)
        return go(trap)

    return prepare


def _pickle_in_zip(trap: Trap, step: Path) -> None:
    torch.save({"state_dict": Code()}, step / "training.ckpt")


def _plain_pickle(trap: Trap, step: Path) -> None:
    (step / "training.ckpt").write_bytes(pickle.dumps(Code()))


def _compressed(trap: Trap, step: Path) -> None:
    with zipfile.ZipFile(step / "training.ckpt") as archive:
        members = {m.filename: archive.read(m) for m in archive.infolist()}
    with zipfile.ZipFile(step / "training.ckpt", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def _repeated_elements(trap: Trap, step: Path) -> None:
    state = torch.load(step / "training.ckpt", weights_only=True)
    name = max(state["state_dict"], key=lambda name: state["state_dict"][name].numel())
    state["state_dict"][name] = torch.zeros(1).expand(state["state_dict"][name].shape)
    torch.save(state, step / "training.ckpt")


_CANARY = "tests.faults.canary.touch"
_EXPRESSION = "__import__('tests.faults.canary', fromlist=['touch']).touch()"


def _wrong_loops(trap: Trap, step: Path) -> None:
    state = torch.load(step / "training.ckpt", weights_only=True)
    state["loops"] = {"fit_loop": _EXPRESSION}
    torch.save(state, step / "training.ckpt")


def _wrong_optimizer(trap: Trap, step: Path) -> None:
    state = torch.load(step / "training.ckpt", weights_only=True)
    state["optimizer_states"] = [{"state": {}, "param_groups": []}]
    torch.save(state, step / "training.ckpt")


def _pickled_weights(trap: Trap, step: Path) -> None:
    (step / "model" / "model.safetensors").unlink()
    torch.save({"x": Code()}, step / "model" / "pytorch_model.bin")


def _config(**changes: Any) -> Change:
    def change(trap: Trap, step: Path) -> None:
        path = step / "model" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        for name in ("evil.py", "modeling_evil.py", "configuration_evil.py"):
            (step / "model" / name).write_text(f"open({str(trap.canary)!r}, 'w').close()")

    return change


def _stored_config(trap: Trap, step: Path) -> None:
    path = step / "model" / "training.json"
    record = json.loads(path.read_text())
    record["config"]["model"] = {"_target_": _CANARY}
    path.write_text(json.dumps(record))


def _stored_data_config(trap: Trap, step: Path) -> None:
    path = step / "model" / "data.json"
    record = json.loads(path.read_text())
    record["config"] |= {"_target_": _CANARY, "obtain": f"touch {trap.canary}"}
    path.write_text(json.dumps(record))


def _manifest(name: str) -> Change:
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


def _link_out(name: str) -> Change:
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


def _safetensors(header: bytes, length: int | None = None) -> Change:
    def change(trap: Trap, step: Path) -> None:
        size = struct.pack("<Q", len(header) if length is None else length)
        (step / "model" / "model.safetensors").write_bytes(size + header)

    return change


_NO_DATA = json.dumps({"model.norm.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()


_CHECKPOINTS: tuple[tuple[str, Change, bool, dict[str, tuple[int, ...]]], ...] = (
    # payload, change, whether the manifest is made to agree, door -> exit codes
    ("pickle in a torch archive", _pickle_in_zip, True, {"train resume=": (4,), "probe ckpt=": (0,)}),
    ("plain pickle as training.ckpt", _plain_pickle, True, {"train resume=": (4,)}),
    ("compressed torch archive", _compressed, True, {"train resume=": (4,)}),
    ("tensor of stride 0 that is larger than its storage", _repeated_elements, True, {"train resume=": (4,)}),
    ("loop state that is none", _wrong_loops, True, {"train resume=": (4,)}),
    ("optimizer state of another optimizer", _wrong_optimizer, True, {"train resume=": (4,)}),
    ("pickle in pytorch_model.bin", _pickled_weights, True, {d: (4,) for d in _DOORS if d != "train resume="}),
    ("auto_map with code beside it", _config(auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"},
     trust_remote_code=True), True, {d: (0,) for d in _DOORS if d != "train resume="}),
    ("attention kernel from the hub", _config(attn_implementation="owner/kernel", _attn_implementation="owner/kernel"),
     True, {"probe ckpt=": (0,)}),
    ("_target_ in config.json", _config(_target_=_CANARY, model_type="evil"), True,
     {d: (4,) for d in _DOORS if d != "train resume="}),
    ("a hundred layers where three are held", _config(num_hidden_layers=100, layer_types=None), True,
     {d: (4,) for d in _DOORS if d != "train resume="}),
    ("head_dim of twice what is held", _config(head_dim=32), True, {d: (4,) for d in _DOORS if d != "train resume="}),
    ("vocabulary of 2^14 where 300 are held", _config(vocab_size=2**14), True,
     {d: (4,) for d in _DOORS if d != "train resume="}),
    ("activation that is an expression", _config(hidden_act=_EXPRESSION), True,
     {"probe ckpt=": (4,)}),
    ("_target_ in the stored configuration", _stored_config, True, {"train resume=": (4,)}),
    ("_target_ and a command in data.json", _stored_data_config, True, {"probe ckpt=": (2,)}),
    *((f"deeply nested {name}", write(f"model/{name}", deep), True,
       {d: (4,) for d in _DOORS if name != "config.json" or d != "train resume="})
      for name in ("config.json", "training.json", "data.json")),
    ("huge config.json", write("model/config.json", huge), True, {"probe ckpt=": (4,)}),
    ("deeply nested manifest", write("manifest.json", deep), False, {d: (4,) for d in _DOORS}),
    ("manifest that climbs out", _manifest("../../../../outside/precious.txt"), False, {d: (4,) for d in _DOORS}),
    ("manifest with an absolute path", _manifest("{outside}/precious.txt"), False, {d: (4,) for d in _DOORS}),
    ("safetensors index that climbs out", _index, True, {"probe ckpt=": (4,)}),
    ("weights linked from outside", _link_out("model/model.safetensors"), True, {d: (4,) for d in _DOORS}),
    ("training.ckpt linked from outside", _link_out("training.ckpt"), True, {"train resume=": (4,)}),
    ("pipe in place of a file", _fifo, False, {d: (4,) for d in _DOORS if d != "probe baseline="}),
    ("safetensors header of one byte more than the file", _safetensors(b"{}", 3), True,
     {d: (4,) for d in _DOORS if d != "train resume="}),
    ("safetensors tensor of more than the file", _safetensors(_NO_DATA), True,
     {d: (4,) for d in _DOORS if d != "train resume="}),
    ("safetensors header nested deeply", _safetensors(deep().encode()), True, {"probe ckpt=": (4,)}),
)  # fmt: skip

_SHORT = {"pickle in a torch archive", "compressed torch archive", "manifest that climbs out",
          "head_dim of twice what is held", "weights linked from outside"}  # fmt: skip

CASES: tuple[Case, ...] = (
    *(
        Case(door, payload, _at(door, change, seal), codes, payload in _SHORT and codes != (0,))
        for payload, change, seal, doors in _CHECKPOINTS
        for door, codes in doors.items()
    ),
)

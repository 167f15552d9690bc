"""Checkpoint folders: whole and verified, or refused."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from run_comparison import state
from training_runs import run, settings
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import DynamicCache

from attnres.data import DataConfig, prepare
from attnres.errors import CheckpointError, NumericsError, StorageError
from attnres.files.run_folder import latest, list_steps, verify
from attnres.training import checkpoint as checkpoint_module
from attnres.training.checkpoint import prune, remove_leftovers, write_checkpoint
from attnres.training.evaluation import routing_slices, validation_loss
from attnres.training.export import ExportInfo, export_model
from attnres.training.loss import nll_sum
from attnres.training.models import build_model, model_config


@pytest.fixture
def write(data: dict[str, Any]) -> Callable[[Path], None]:
    """Writes a checkpoint of a fresh model; the model's weights are `write.model`'s."""
    corpus = prepare(DataConfig(**data))
    model = build_model(model_config(settings(Path(), data)["model"], corpus.vocab_size, corpus.eos_id, 16), 0)
    info = ExportInfo(Path(corpus.tokenizer_path), corpus.eos_id, {"name": "x"}, {"fingerprint": "f"})

    def write_one(path: Path) -> None:
        weights = {f"model.{name}": value for name, value in model.state_dict().items()}
        entry = {"step": 1, "tokens": 2, "val_loss": None}
        write_checkpoint(path, {"state_dict": weights, "attnres": entry}, model, info)

    write_one.model = model  # type: ignore[attr-defined]
    return write_one


@pytest.mark.parametrize(
    "error", [torch.AcceleratorError("CUDA error: device-side assert triggered"), MemoryError("no more")]
)
def test_a_failure_of_the_machine_while_saving_or_reading_is_no_fault_of_the_disk_or_the_file(
    write: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise error

    write(tmp_path / "whole")
    monkeypatch.setattr(torch, "save", fails)
    monkeypatch.setattr(torch, "load", fails)
    with pytest.raises(type(error)):
        write(tmp_path / "step")
    with pytest.raises(type(error)):
        checkpoint_module.read_state(tmp_path / "whole" / "training.ckpt", write.model)  # type: ignore[attr-defined]


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_verify_accepts_what_train_wrote(original: Path) -> None:
    assert list(list_steps(original)) == [4, 6]
    for path in list_steps(original).values():
        files = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()}
        assert set(verify(path)["files"]) == files - {"manifest.json"}
        assert {"training.ckpt", "model/model.safetensors", "model/tokenizer.json", "model/data.json"} <= files


def test_verify_notices_a_flipped_bit_in_every_file(folder: Path) -> None:
    path = folder / "checkpoints" / "step_00000006"
    names = list(verify(path)["files"])
    assert len(names) >= 7
    for name in names:
        flip_bit(path / name)
        with pytest.raises(CheckpointError, match="sha256 differs"):
            verify(path)
        flip_bit(path / name)
    verify(path)


@pytest.mark.parametrize("damage", ["truncate", "remove", "no manifest", "broken manifest", "escape"])
def test_verify_refuses_damage(folder: Path, damage: str) -> None:
    path = folder / "checkpoints" / "step_00000006"
    weights, manifest = path / "model" / "model.safetensors", path / "manifest.json"
    if damage == "truncate":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif damage == "remove":
        weights.unlink()
    elif damage == "no manifest":
        manifest.unlink()
    elif damage == "broken manifest":
        manifest.write_text(manifest.read_text()[:-20])
    else:
        record = json.loads(manifest.read_text())
        record["files"]["../../config.yaml"] = {"sha256": "0", "bytes": 1}
        manifest.write_text(json.dumps(record) + "\n")
    with pytest.raises(CheckpointError, match="outside" if damage == "escape" else "choose another"):
        verify(path)


def test_latest_falls_back_loudly(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert latest(folder) == folder / "checkpoints" / "step_00000006"
    flip_bit(folder / "checkpoints" / "step_00000006" / "training.ckpt")
    with caplog.at_level(logging.WARNING):
        assert latest(folder) == folder / "checkpoints" / "step_00000004"
    assert "CORRUPT CHECKPOINT" in caplog.text and "step_00000006/training.ckpt" in caplog.text
    flip_bit(folder / "checkpoints" / "step_00000004" / "model" / "config.json")
    with pytest.raises(CheckpointError, match="none of its 2 checkpoints is intact"):
        latest(folder)
    assert latest(folder / "elsewhere") is None


def test_train_falls_back_to_an_intact_checkpoint_and_ends_the_same(
    folder: Path, original: Path, data: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    flip_bit(folder / "checkpoints" / "step_00000006" / "training.ckpt")
    with caplog.at_level(logging.WARNING):
        assert run(settings(folder.parent, data)) == folder
    assert "CORRUPT CHECKPOINT" in caplog.text
    verify(folder / "checkpoints" / "step_00000006")
    ours, theirs = state(folder, 6)["state_dict"], state(original, 6)["state_dict"]
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("kind", ["attnres", "vanilla"])
def test_exported_folder_loads_with_the_same_logits(
    tmp_path: Path, data: dict[str, Any], kind: str, original: Path
) -> None:
    run_folder = original if kind == "attnres" else run(settings(tmp_path, data, kind))
    export = run_folder / "checkpoints" / "step_00000006" / "model"
    loaded, info = AutoModelForCausalLM.from_pretrained(export, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert loaded.config.architectures == [type(loaded).__name__] and loaded.dtype == torch.float32
    trained = type(loaded)(loaded.config)
    weights = state(run_folder, 6)["state_dict"]
    trained.load_state_dict({name.removeprefix("model."): value for name, value in weights.items()})
    ids = torch.arange(16)[None]
    assert torch.equal(loaded.eval()(ids).logits, trained.eval()(ids).logits)
    written = loaded.generate(ids[:, :4], max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert written.shape == (1, 7) and torch.equal(written[:, :4], ids[:, :4])

    corpus = prepare(DataConfig(**data))
    tokenizer = AutoTokenizer.from_pretrained(export)
    text = "def alpha3 return x0"
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == corpus.tokenizer.encode(text).ids
    assert tokenizer.eos_token_id == loaded.config.eos_token_id == corpus.eos_id
    described = json.loads((export / "data.json").read_text())
    assert described["fingerprint"] == corpus.fingerprint
    assert DataConfig(**described["config"]) == DataConfig(**data)
    training = json.loads((export / "training.json").read_text())
    assert (training["step"], training["tokens"], training["name"]) == (6, 6 * 4 * 16, kind)
    assert training["val_loss"] == json.loads((run_folder / "complete.json").read_text())["val_loss"]


def test_write_checkpoint_refuses_non_finite_weights(tmp_path: Path, write: Any) -> None:
    with torch.no_grad():
        write.model.model.norm.weight[3] = torch.nan
    with pytest.raises(NumericsError, match=r"not finite \(model\.norm\.weight and 0 more\)"):
        write(tmp_path / "checkpoints" / "step_00000001")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("where", ["before", "torch", "export"])
def test_write_checkpoint_on_a_full_disk_leaves_nothing(
    tmp_path: Path, write: Any, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def full(*arguments: Any, **keywords: Any) -> None:
        if where == "torch":
            raise RuntimeError("PytorchStreamWriter failed writing file data/1: file write failed")
        raise OSError(28, "No space left on device")

    if where == "before":
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    else:
        monkeypatch.setattr(*{"torch": (torch, "save"), "export": (checkpoint_module, "export_model")}[where], full)
    with pytest.raises(StorageError, match="free space"):
        write(tmp_path / "checkpoints" / "step_00000001")
    assert not list((tmp_path / "checkpoints").iterdir())


def test_write_checkpoint_replaces_an_older_folder(tmp_path: Path, write: Any) -> None:
    path = tmp_path / "checkpoints" / "step_00000001"
    write(path)
    (path / "stray").write_text("x")
    flip_bit(path / "training.ckpt")
    write(path)
    verify(path)
    assert not (path / "stray").exists()
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_prune_keeps_the_last_and_removes_neither_the_newest_nor_a_permanent_one(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5, 6, 9):
        (tmp_path / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)

    def left(newest: int, keep: int, *permanent: int) -> list[int]:
        prune(tmp_path, newest, keep, permanent.__contains__)
        return list(list_steps(tmp_path))

    assert left(6, 2, 2, 4) == [2, 4, 5, 6, 9]
    assert left(6, 2) == [5, 6, 9]
    assert left(6, 1) == [6, 9]
    assert left(5, 1) == [6, 9]


def test_remove_leftovers_removes_temporary_folders_only(tmp_path: Path) -> None:
    for name in (".tmp-step_00000002", ".trash-step_00000001", "step_00000001"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    remove_leftovers(tmp_path)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]


def test_export_of_a_head_that_is_not_the_embedding_says_so(write: Any, tmp_path: Path) -> None:
    model = write.model
    assert model.config.tie_word_embeddings
    model.lm_head.weight = torch.nn.Parameter(2 * model.lm_head.weight.detach())
    write(tmp_path / "step_00000001")
    folder = tmp_path / "step_00000001" / "model"
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(loaded.lm_head.weight, 2 * loaded.model.embed_tokens.weight)


@pytest.mark.parametrize("kind", ["attnres", "vanilla"])
def test_an_exported_model_generates_with_a_cache(tmp_path: Path, data: dict[str, Any], kind: str) -> None:
    corpus = prepare(DataConfig(**data))
    plain = settings(Path(), data, kind)["model"]
    info = ExportInfo(Path(corpus.tokenizer_path), corpus.eos_id, {}, {})
    built = build_model(model_config(plain, corpus.vocab_size, corpus.eos_id, 64), 0)
    export_model(tmp_path, built, built.state_dict(), info, {})
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    embedded: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda module, args, out: embedded.append(args[0].numel()))
    prompt = torch.arange(1, 17)[None]
    arguments = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 32, "min_new_tokens": 32}
    arguments |= {"do_sample": False, "pad_token_id": 0}
    found = model.generate(prompt, **arguments)
    assert sum(embedded) == 16 + 31
    for how in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": built.eval()}):
        assert torch.equal(model.generate(prompt, **arguments, **how), found), how


@pytest.mark.parametrize("kind", ["attnres", "vanilla"])
def test_training_builds_no_cache(data: dict[str, Any], kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = prepare(DataConfig(**data))
    model = build_model(model_config(settings(Path(), data, kind)["model"], corpus.vocab_size, corpus.eos_id, 16), 0)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a cache is built")

    monkeypatch.setattr(DynamicCache, "__init__", refuse)
    batch = {"input_ids": torch.zeros(2, 16, dtype=torch.long), "labels": torch.zeros(2, 16, dtype=torch.long)}
    nll_sum(model, batch)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    validation_loss(trainer, model, [batch], limit=1)
    if kind == "attnres":
        routing_slices(trainer, model, model.config.plan(), batch)
    with pytest.raises(AssertionError, match="a cache is built"):
        model(batch["input_ids"])

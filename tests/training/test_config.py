"""Configurations: what they refuse and how they say it, and which keys name the run folder."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from training_runs import settings

from attnres.config import agreeing, build, decisive, differences, key, to_plain
from attnres.errors import ConfigError
from attnres.files.provenance import collect, redact
from attnres.processes.hardware import hardware
from attnres.training.config import TrainConfig, config_hash, run_folder
from attnres.training.models import model_config


@dataclass(frozen=True)
class Inner:
    rate: float = 0.5
    kind: Literal["slow", "fast"] = "slow"
    sizes: tuple[int, ...] = ()
    limit: int | None = None


@dataclass(frozen=True)
class Outer:
    name: str
    flag: bool = False
    inner: Inner = field(default_factory=Inner)


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"name": "x", "inner": {"rat": 1.0}}, r"unknown key 'inner\.rat'; did you mean 'inner\.rate'\?"),
        ({"name": "x", "rate": 1.0}, r"unknown key 'rate'; did you mean 'inner\.rate'\?"),
        ({"name": "x", "zzzz": 1}, r"unknown key 'zzzz'; known keys: flag, inner, name"),
        ({}, r"missing key 'name'"),
        ({"name": 3}, r"name: expected str, got int 3"),
        ({"name": "x", "flag": 1}, r"flag: expected bool, got int 1"),
        ({"name": "x", "inner": {"limit": True}}, r"inner\.limit: expected int or null, got bool True"),
        ({"name": "x", "inner": {"rate": "1e-3"}}, r"inner\.rate: expected float, got str '1e-3'"),
        ({"name": "x", "inner": {"sizes": [1, "a"]}}, r"inner\.sizes\[1\]: expected int, got str 'a'"),
        ({"name": "x", "inner": {"kind": "fats"}}, r"inner\.kind: .*'slow', 'fast', got 'fats'; .*'fast'"),
        ({"name": "x", "inner": 3}, r"inner: expected a mapping, got int 3"),
    ],
)
def test_build_names_the_key_and_the_remedy(mapping: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(Outer, mapping)


def test_build_converts_lists_and_ints_only() -> None:
    built = build(Outer, {"name": "x", "inner": {"rate": 1, "sizes": [1, 2], "limit": None}})
    assert built == Outer("x", False, Inner(1.0, "slow", (1, 2), None))
    assert isinstance(built.inner.rate, float)


def test_build_inverts_to_plain(tmp_path: Path, data: dict[str, Any]) -> None:
    config = build(TrainConfig, settings(tmp_path, data))
    assert build(TrainConfig, to_plain(config)) == config
    assert to_plain(config)["optim"]["betas"] == [0.9, 0.95]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim__lr": -1.0}, r"optim\.lr: expected a number > 0, got -1"),
        ({"optim__lrr": 1.0}, r"unknown key 'optim\.lrr'; did you mean 'optim\.lr'"),
        ({"optim__betas": [0.9, 1.0]}, r"optim\.betas: expected two numbers in \[0, 1\)"),
        ({"optim__warmup_steps": 7}, r"optim\.warmup_steps: 7 exceeds trainer\.max_steps 6"),
        ({"trainer__precision": "bf16-true"}, r"trainer\.precision: expected one of '32-true', 'bf16-mixed'"),
        ({"trainer__micro_batch_size": 3}, r"trainer\.micro_batch_size: 3 does not divide"),
        ({"trainer__devices": "all"}, r"trainer\.devices: expected int or 'auto', got str 'all'"),
        ({"trainer__keep_last": 0}, r"trainer\.keep_last: expected an integer >= 1, got 0"),
        ({"data__sequence_lenght": 3}, r"unknown key 'data\.sequence_lenght'; did you mean 'data\.sequence_length'"),
        ({"name": "../x"}, r"name: .*names a folder"),
        ({"seed": -1}, r"seed: expected 0 <= seed"),
    ],
)
def test_train_config_refuses(tmp_path: Path, data: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(TrainConfig, settings(tmp_path, dict(data), **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "vanila"}, r"model\.kind: expected one of attnres, vanilla, got 'vanila'; did you mean 'vanilla'"),
        ({"hiden_size": 3}, r"unknown key 'model\.hiden_size'; did you mean 'model\.hidden_size'"),
        ({"rms_norm_eps": 1}, r"model: .*rms_norm_eps.*expected float, got int"),
        ({"attnres_sources": "blocksum"}, r"model: attnres_sources: expected one of block_sum"),
        ({"vocab_size": 10}, r"model\.vocab_size: 10 is smaller than the corpus's 300"),
        ({"max_position_embeddings": 8}, r"model\.max_position_embeddings: 8 is below data\.sequence_length 16"),
        ({"num_key_value_heads": 3}, r"model\.num_key_value_heads: 3 does not divide num_attention_heads 2"),
    ],
)
def test_model_config_refuses(tmp_path: Path, data: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    model = settings(tmp_path, data)["model"] | changes
    with pytest.raises(ConfigError, match=message):
        model_config(model, vocab_size=300, eos_id=0, sequence_length=16)


def test_model_config_takes_vocabulary_and_rope_theta(tmp_path: Path, data: dict[str, Any]) -> None:
    model = settings(tmp_path, data)["model"] | {"rope_theta": 1e6, "vocab_size": None}
    config = model_config(model, vocab_size=300, eos_id=7, sequence_length=16)
    assert (config.vocab_size, config.eos_token_id) == (300, 7)
    assert config.rope_parameters["rope_theta"] == 1e6
    assert model_config(model | {"vocab_size": 512}, 300, 7, 16).vocab_size == 512


def test_run_folder_depends_on_what_is_computed_only(tmp_path: Path, data: dict[str, Any]) -> None:
    base = build(TrainConfig, settings(tmp_path, data))
    executed = {
        "resume": "must",
        "debug": True,
        "data__cache_dir": "elsewhere",
        "logger__wandb": "online",
        "trainer__micro_batch_size": 2,
        "trainer__devices": 2,
        "trainer__accelerator": "gpu",
        "trainer__strategy": "fsdp2",
        "trainer__num_workers": 4,
        "trainer__compile": True,
        "trainer__checkpoint_every_steps": 5,
    }
    moved = build(TrainConfig, settings(tmp_path, dict(data), **executed))
    assert run_folder(moved) == run_folder(base)
    assert run_folder(base).name == f"attnres-{config_hash(base)}"
    for name, value in {
        "seed": 1,
        "optim__lr": 1e-4,
        "trainer__max_steps": 7,
        "trainer__precision": "bf16-mixed",
        "model__hidden_size": 64,
        "data__sequence_length": 32,
    }.items():
        assert run_folder(build(TrainConfig, settings(tmp_path, dict(data), **{name: value}))) != run_folder(base), name


@dataclass(frozen=True)
class Innermost:
    rate: float = 0.5
    later: int = key(0, as_before=0)
    threads: int = key(1, hashed=False)
    steps: int = key(3, may_differ=True)


@dataclass(frozen=True)
class Middle:
    inner: Innermost = key(Innermost)
    added: Innermost = key(Innermost, as_before={"rate": 0.5, "steps": 3})


@dataclass(frozen=True)
class Whole:
    middle: Middle = key(Middle)
    free: dict[str, Any] = key(dict)


def test_what_decides_is_said_beside_the_field_at_any_depth() -> None:
    plain = to_plain(Whole(free={"threads": 2}))
    shown = {"middle": {"inner": {"rate": 0.5, "steps": 3}}, "free": {"threads": 2}}
    assert decisive(Whole, plain) == shown
    plain["middle"]["inner"] |= {"later": 4, "unknown": 5, "threads": 6, "steps": 7}
    plain["middle"]["added"]["rate"] = 0.25
    inner = {"rate": 0.5, "later": 4, "unknown": 5, "steps": 7}
    shown["middle"] = {"inner": inner, "added": {"rate": 0.25, "steps": 3}}
    assert decisive(Whole, plain) == shown
    shown["middle"] = {"inner": {k: v for k, v in inner.items() if k != "steps"}, "added": {"rate": 0.25}}
    assert agreeing(Whole, plain) == shown


def test_differences_lists_dotted_paths() -> None:
    listed = differences({"a": 1, "b": {"c": 2, "d": 3}}, {"a": 1, "b": {"c": 4}, "e": 5})
    assert listed == [("b.c", 2, 4), ("b.d", 3, None), ("e", None, 5)]


def test_provenance_masks_secrets_and_keeps_the_rest() -> None:
    command = "train.py logger.api_key=abc --token xyz hf_token=q data.tokenizer=t.json seed=3"
    assert redact(command) == "train.py logger.api_key=*** --token *** hf_token=*** data.tokenizer=t.json seed=3"
    record = collect(command, hardware(), {"training": 3}, {"data": "f"})
    assert record["seeds"] == {"training": 3}
    assert record["versions"]["torch"] and "abc" not in str(record)

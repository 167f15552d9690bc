"""Runs that start from a vanilla run's weights: the same function at step 0, and only what is to learn moves."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from run_comparison import rows, same, state
from training_runs import run, settings

from attnres import load_model
from attnres.config import build, decisive, to_plain
from attnres.data import prepare
from attnres.errors import AttnResError, CheckpointError, ConfigError
from attnres.model.locate import locate
from attnres.training.config import TrainConfig, config_hash, run_folder
from attnres.training.initial_weights import initial_model, resolve_base
from attnres.training.models import build_model
from attnres.training.module import nll_sum

UNIFORM = {"model__attnres_exact_uniform": True}
# Large enough for the factor 1/S^2 of an exact start to show.
EPS = {"model__rms_norm_eps": 1.0e-2}
BIASES = {"model__attnres_content": False, "model__attnres_bias": "sources"}


@pytest.fixture(scope="module")
def vanilla(tmp_path_factory: pytest.TempPathFactory, data: dict[str, Any]) -> Path:
    """A vanilla run whose weights are far from their start, so that a wrong copy shows."""
    return run(settings(tmp_path_factory.mktemp("base"), data, kind="vanilla", optim__lr=0.02, **EPS))


def control(vanilla: Path, data: dict[str, Any], folder: Path, wrap: str | None = "uniform", **changes: Any) -> dict:
    """Configuration of an AttnRes run that starts from the vanilla run."""
    changes = EPS | (UNIFORM if wrap == "uniform" else {}) | changes
    return settings(folder, data, **{"init": {"base": str(vanilla), "wrap": wrap}} | changes)


def started(plain: dict[str, Any]) -> torch.nn.Module:
    """The model of a run in front of its first step."""
    config, base = resolve_base(build(TrainConfig, plain))
    assert base is not None
    return initial_model(config, prepare(config.data), base)


def batch(plain: dict[str, Any]) -> dict[str, torch.Tensor]:
    tokens = torch.from_numpy(prepare(build(TrainConfig, plain).data).tokens("validation")[: 8 * 17].astype("int64"))
    windows = tokens.view(8, 17)
    return {"input_ids": windows[:, :-1], "labels": windows[:, 1:]}


def loss(model: torch.nn.Module, plain: dict[str, Any]) -> float:
    total, count = nll_sum(model.eval(), batch(plain))
    return float(total.detach() / count)


@pytest.mark.parametrize("changes", [{}, BIASES])
def test_uniform_start_has_the_loss_of_its_base(vanilla, data, tmp_path, changes):
    plain = control(vanilla, data, tmp_path, **changes)
    base = loss(load_model(vanilla), plain)
    assert abs(loss(started(plain), plain) - base) <= 1e-5
    fresh = loss(build_model(load_model(vanilla).config, 0), plain)
    assert abs(fresh - base) > 0.1


def test_recency_start_is_near_its_base(vanilla, data, tmp_path):
    plain = control(vanilla, data, tmp_path, "recency", model__attnres_sources="cumulative",
                    model__attnres_recency_bias_init=10.0)  # fmt: skip
    assert abs(loss(started(plain), plain) - loss(load_model(vanilla), plain)) <= 1e-3


@pytest.mark.parametrize(
    ("trainable", "changes", "learns"),
    [
        ("all", {}, lambda name: True),
        ("body", {}, lambda name: "_res_" not in name),
        ("routing", {}, lambda name: "_res_" in name),
        ("routing", BIASES, lambda name: name.endswith("_res_bias")),
        ("routing_bias", {}, lambda name: name.endswith("_res_bias")),
    ],
)
def test_only_what_is_to_learn_moves(vanilla, data, tmp_path, trainable, changes, learns):
    plain = control(vanilla, data, tmp_path, trainable=trainable, **changes)
    before = {name: value.clone() for name, value in started(plain).state_dict().items()}
    after = load_model(run(plain)).state_dict()
    assert before.keys() == after.keys()
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    reachable = {name for name, parameter in started(plain).named_parameters() if parameter.requires_grad}
    if "lm_head.weight" in moved:
        reachable.add("lm_head.weight")  # tied to the embedding
    # A key-norm weight starts behind a query of zero, so its first gradient is zero; later ones are not.
    assert moved == reachable
    assert moved and all(map(learns, moved))


def test_routing_learns_the_same_on_a_frozen_base(vanilla, data, tmp_path):
    plain = control(vanilla, data, tmp_path)
    gradients = {}
    for trainable in ("all", "routing"):
        model = started(plain | {"trainable": trainable})
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "_res_proj" in name:
                    parameter.copy_(torch.linspace(-0.5, 0.5, parameter.numel()).view_as(parameter))
        nll_sum(model, batch(plain))[0].backward()
        gradients[trainable] = {name: p.grad for name, p in model.named_parameters() if "_res_" in name}
    for name, expected in gradients["all"].items():
        torch.testing.assert_close(gradients["routing"][name], expected, msg=name)


def test_resumed_control_ends_with_the_same_bits(vanilla, data, tmp_path):
    plain = control(vanilla, data, tmp_path, trainable="routing")
    folder = run(plain)
    whole, table = state(folder, 6), rows(folder)
    (folder / "complete.json").unlink()
    shutil.rmtree(folder / "checkpoints" / "step_00000006")
    assert run(plain) == folder
    again = state(folder, 6)
    for key in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert same(again[key], whole[key]), key
    assert rows(folder) == table


def test_auto_takes_the_one_complete_vanilla_run(vanilla, data, tmp_path):
    shutil.copytree(vanilla, tmp_path / vanilla.name)
    plain = control("auto", data, tmp_path)
    config, base = resolve_base(build(TrainConfig, plain))
    assert base is not None and base.run == vanilla.name
    assert config.init.digest == base.digest

    shutil.copytree(vanilla, tmp_path / "vanilla-other")
    with pytest.raises(ConfigError, match=r"init\.base: 2 vanilla runs .*choose with init\.base=PATH"):
        resolve_base(build(TrainConfig, plain))
    (tmp_path / "vanilla-other" / "complete.json").unlink()
    assert resolve_base(build(TrainConfig, plain))[0] == config

    with pytest.raises(ConfigError, match=r"no complete vanilla run .*init\.base=PATH"):
        resolve_base(build(TrainConfig, plain | {"seed": 1}))


def test_folder_depends_on_the_weights_and_not_on_where_they_lie(vanilla, data, tmp_path):
    elsewhere = shutil.copytree(vanilla, tmp_path / "elsewhere")
    folders = {
        run_folder(resolve_base(build(TrainConfig, control(path, data, tmp_path)))[0])
        for path in (vanilla, elsewhere, elsewhere / "checkpoints" / "step_00000006")
    }
    assert len(folders) == 1
    earlier = control(vanilla / "checkpoints" / "step_00000004", data, tmp_path)
    assert run_folder(resolve_base(build(TrainConfig, earlier))[0]) not in folders


def test_folder_of_a_run_without_a_base_does_not_depend_on_these_keys(data, tmp_path):
    plain = settings(tmp_path, data)
    spelled = plain | {"trainable": "all", "init": {"base": None, "wrap": None, "digest": None}}
    assert not {"init", "trainable"} & decisive(TrainConfig, to_plain(build(TrainConfig, plain))).keys()
    assert config_hash(build(TrainConfig, plain)) == config_hash(build(TrainConfig, spelled))
    assert config_hash(build(TrainConfig, plain | {"trainable": "body"})) != config_hash(build(TrainConfig, plain))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"init": {"base": "no/such/run", "wrap": "uniform"}}, CheckpointError, "no such file"),
        ({"init": {"base": None, "wrap": "uniform"}}, ConfigError, r"init\.wrap: 'uniform' needs init\.base"),
        ({"model__attnres_exact_uniform": False}, ConfigError, r"needs model\.attnres_exact_uniform=True"),
        ({"model__attnres_sources": "cumulative"}, ConfigError, r"needs model\.attnres_sources=block_sum"),
        ({"model__num_hidden_layers": 2}, CheckpointError, r"num_hidden_layers 3 there, 2 here"),
        ({"model__rms_norm_eps": 1.0e-5}, CheckpointError, r"rms_norm_eps 0.01 there, 1e-05 here"),
        ({"data__seed": 3}, CheckpointError, "fingerprint"),
        ({"data__vocab_size": 290}, CheckpointError, "does not fit this run's data"),
        ({"trainable": "routing", "kind": "vanilla", "wrap": None}, ConfigError, "leaves nothing to train"),
        ({"wrap": None}, CheckpointError, r"set init\.wrap to uniform"),
    ],
)
def test_base_that_does_not_fit_is_refused(vanilla, data, tmp_path, changes, error, message):
    with pytest.raises(error, match=message) as caught:
        started(control(vanilla, dict(data), tmp_path, **changes))
    assert caught.value.code in (2, 4) and "\n" not in str(caught.value)


def test_base_that_is_damaged_or_still_training_is_refused(vanilla, data, tmp_path):
    copy = shutil.copytree(vanilla, tmp_path / "copy")
    step = copy / "checkpoints" / "step_00000006"
    digest = locate(str(copy)).digest

    def refused(base: Path, message: str, **init: Any) -> None:
        plain = control(vanilla, data, tmp_path, init={"base": str(base), "wrap": "uniform", **init})
        with pytest.raises(AttnResError, match=message):
            resolve_base(build(TrainConfig, plain))

    refused(copy, r"init\.digest says", digest="0123")
    (copy / "complete.json").unlink()
    refused(copy, "is not complete; finish it, or name one of its checkpoints")
    named = control(step, data, tmp_path)
    assert resolve_base(build(TrainConfig, named))[0].init.digest == digest
    weights = step / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00")
    refused(step, "sha256 differs from the manifest")


def test_attnres_base_starts_an_attnres_run_with_its_routing(vanilla, data, tmp_path):
    first = run(control(vanilla, data, tmp_path, name="first"))
    plain = control(first, data, tmp_path, None, trainable="routing_bias", **UNIFORM)
    trained = load_model(first).state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in started(plain).state_dict().items())
    with pytest.raises(CheckpointError, match=r"is no vanilla Qwen3"):
        started(control(first, data, tmp_path))

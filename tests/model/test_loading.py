"""Loading every kind of checkpoint, strictly, and the wraps of a vanilla Qwen3."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3ForCausalLM

from attnres import Qwen3AttnResForCausalLM, load_model, wrap_qwen3
from attnres.errors import CheckpointError
from attnres.model.wraps import schedule_weights

GOLDEN = Path(__file__).parents[1] / "golden"
CUMULATIVE = GOLDEN / "cumulative_L6_n3_b3"
SEEDED = GOLDEN / "seeded_block_sum_L6_n3"


def copy_of(source: Path, target: Path, config: dict | None = None, weights=None) -> Path:
    """A checkpoint with keys of its config changed (None removes) and its weights passed through a function."""
    shutil.copytree(source, target)
    path = target / "config.json"
    stored = json.loads(path.read_text()) | (config or {})
    path.write_text(json.dumps({key: value for key, value in stored.items() if value is not None}))
    if weights is not None:
        save_file(weights(load_file(target / "model.safetensors")), target / "model.safetensors", {"format": "pt"})
    return target


WAYS = {
    "from_pretrained": Qwen3AttnResForCausalLM.from_pretrained,
    "from_pretrained in bf16": lambda path: Qwen3AttnResForCausalLM.from_pretrained(path, dtype=torch.bfloat16),
    "auto": AutoModelForCausalLM.from_pretrained,
    "from_config": lambda path: AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path)),
    "load_model": load_model,
    "assigned": lambda path: assigned(path),
}
# Control arms, and conventions in which other reads have one source, or the same one twice.
ARMS = [
    {"attnres_sources": "block_sum"},
    {"attnres_sources": "seeded_block_sum"},
    {"attnres_sources": "full", "attnres_bias": "sources"},
    {"attnres_sources": "cumulative", "attnres_content": False},
    {"attnres_bias": "sources", "attnres_content": False},
]


def assigned(path: Path) -> Qwen3AttnResForCausalLM:
    """Built without memory and filled from a file."""
    with torch.device("meta"):
        model = Qwen3AttnResForCausalLM(AutoConfig.from_pretrained(path))
    model.load_state_dict(load_file(path / "model.safetensors"), strict=False, assign=True)
    model.tie_weights()
    return model


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: "-".join(map(str, arm.values())))
@pytest.mark.parametrize("way", WAYS)
def test_what_no_gradient_reaches_stays_frozen_after_every_way_of_loading(make_model, ids, tmp_path, way, arm):
    model = make_model(**arm)
    model(ids, labels=ids, use_cache=False).loss.backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.save_pretrained(tmp_path)
    loaded = WAYS[way](tmp_path)
    assert {name for name, parameter in loaded.named_parameters() if parameter.requires_grad} == reached
    assert len(reached) < len(list(loaded.parameters()))


def test_released_checkpoint_keeps_frozen_what_no_gradient_reaches(ids):
    loaded = Qwen3AttnResForCausalLM.from_pretrained(SEEDED)
    frozen = {name for name, parameter in loaded.named_parameters() if not parameter.requires_grad}
    assert frozen == {f"model.layers.0.attn_res_{name}" for name in ("proj.weight", "norm.weight", "bias")}


@pytest.mark.parametrize("bias", [3.0, 10.0, 100.0])
@torch.no_grad()
def test_wrap_recency_follows_its_schedule(vanilla, ids, bias):
    wrapped = wrap_qwen3(vanilla, "recency", 3, bias)
    for weights in wrapped(ids, output_routing=True).routing:
        expected = torch.tensor(schedule_weights(weights.shape[-1], "recency", bias)).expand_as(weights)
        torch.testing.assert_close(weights, expected, rtol=0, atol=1e-6)


def test_schedule_weights_closed_form():
    assert schedule_weights(4, "uniform") == [0.25] * 4
    # e^3 / (e^3 + 3) on the newest of four sources.
    weights = schedule_weights(4, "recency", 3.0)
    assert weights[-1] == pytest.approx(0.8700, abs=1e-4) and weights[0] == pytest.approx(0.0433, abs=1e-4)
    assert sum(schedule_weights(5, "recency", 800.0)) == pytest.approx(1.0)


@torch.no_grad()
def test_wrap_recency_approaches_the_vanilla_model_as_the_bias_grows(vanilla, ids):
    logits = vanilla(ids).logits
    errors = [float((wrap_qwen3(vanilla, "recency", 3, b)(ids).logits - logits).abs().max()) for b in (1.0, 3.0, 6.0)]
    assert errors[0] > 3 * errors[1] > 9 * errors[2] > 0


@pytest.mark.parametrize("num_blocks", [1, 3, 6])
@torch.no_grad()
def test_wrap_uniform_equals_the_vanilla_model(vanilla, ids, num_blocks):
    wrapped = wrap_qwen3(vanilla, "uniform", num_blocks)
    output = wrapped(ids, output_routing=True)
    torch.testing.assert_close(output.logits, vanilla(ids).logits, rtol=0, atol=1e-5)
    for weights in output.routing:
        torch.testing.assert_close(weights, torch.full_like(weights, 1 / weights.shape[-1]), rtol=0, atol=1e-6)


@torch.no_grad()
def test_wrap_uniform_needs_the_smaller_eps(vanilla, ids):
    """Without dividing eps by S^2 the wrap is another model: the reason for `attnres_exact_uniform`."""
    vanilla.model.embed_tokens.weight.mul_(0.003)
    for exact in (True, False):
        wrapped = wrap_qwen3(vanilla, "uniform", 3)
        wrapped.config.attnres_exact_uniform = exact
        error = float((wrapped(ids).logits - vanilla(ids).logits).abs().max())
        assert (error < 1e-5) == exact


@torch.no_grad()
def test_wrap_survives_saving(vanilla, ids, tmp_path):
    wrapped = wrap_qwen3(vanilla, "uniform", 3)
    wrapped.save_pretrained(tmp_path)
    assert torch.equal(load_model(tmp_path)(ids).logits, wrapped(ids).logits)


def test_wrap_refuses_what_is_not_vanilla(vanilla, make_model):
    with pytest.raises(ValueError, match="vanilla"):
        wrap_qwen3(make_model())
    with pytest.raises(ValueError, match="schedule"):
        wrap_qwen3(vanilla, "newest")


@torch.no_grad()
def test_load_model_vanilla(vanilla, ids, tmp_path):
    vanilla.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert type(loaded) is Qwen3ForCausalLM
    assert torch.equal(loaded(ids).logits, vanilla(ids).logits)


@torch.no_grad()
def test_load_model_sharded(make_model, ids, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert torch.equal(load_model(tmp_path)(ids).logits, model(ids).logits)


def test_load_model_finds_run_step_and_file(make_model, tmp_path):
    step = tmp_path / "run" / "checkpoints" / "step_00000005"
    make_model().save_pretrained(step / "model")
    (step / "training.ckpt").write_bytes(b"")
    for path in (tmp_path / "run", step, step / "model", step / "training.ckpt"):
        assert isinstance(load_model(path), Qwen3AttnResForCausalLM)


def test_load_model_bias_init_resets_the_newest_source():
    stored, reset = load_model(CUMULATIVE), load_model(CUMULATIVE, bias="init")
    name = "model.layers.2.mlp_res_bias"
    assert reset.state_dict()[name].tolist() == [3.0]
    assert stored.state_dict()[name].tolist() == load_file(CUMULATIVE / "model.safetensors")[name].reshape(1).tolist()


def test_from_pretrained_of_a_released_folder_assumes_seeded_and_fails_on_a_mismatch():
    assert Qwen3AttnResForCausalLM.from_pretrained(SEEDED).config.attnres_sources == "seeded_block_sum"
    with pytest.raises(ValueError, match="missing keys.*final_res"):
        Qwen3AttnResForCausalLM.from_pretrained(CUMULATIVE)


def without(*parts):
    return lambda weights: {name: t for name, t in weights.items() if not any(part in name for part in parts)}


def poisoned(weights):
    weights["model.norm.weight"][0] = torch.nan
    return weights


@pytest.mark.parametrize(
    ("config", "weights", "told"),
    [
        ({"attnres_mode": "full"}, None, "attnres_mode"),
        ({"attnres_gate_type": "sigmoid"}, None, "attnres_gate_type"),
        ({"model_type": "llama"}, None, "model_type"),
        ({"attnres_sources": "sums"}, None, "attnres_sources"),
        ({"num_hidden_layers": 5}, None, "unexpected"),
        ({"hidden_size": 16}, None, "shape"),
        ({"hidden_size": 2**20}, None, "asks for about"),
        (None, without("layers.3.mlp."), "3 missing parameters"),
        (None, lambda weights: weights | {"model.extra": torch.zeros(1)}, "unexpected.*model.extra"),
        (None, poisoned, "not finite"),
    ],
)
def test_load_model_refuses_what_does_not_fit(tmp_path, config, weights, told):
    folder = copy_of(SEEDED, tmp_path / "copy", config, weights)
    with pytest.raises(CheckpointError, match=told) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


def test_load_model_ignores_auto_map(tmp_path):
    folder = copy_of(SEEDED, tmp_path / "copy", {"auto_map": {"AutoModelForCausalLM": "evil.Model"}})
    (folder / "evil.py").write_text("raise SystemExit('executed')")
    assert not hasattr(load_model(folder).config, "auto_map")


@pytest.mark.parametrize("content", ["absent", "no config", "no weights", "truncated", "pickle"])
def test_load_model_says_what_is_missing(tmp_path, content):
    folder = tmp_path / "copy"
    if content != "absent":
        copy_of(SEEDED, folder)
    weights = folder / "model.safetensors"
    if content == "no config":
        (folder / "config.json").unlink()
    elif content == "truncated":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif content in ("no weights", "pickle"):
        weights.unlink()
    if content == "pickle":
        (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError):
        load_model(folder)

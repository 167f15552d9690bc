"""Loading every kind of checkpoint, strictly, and the wraps of a vanilla Qwen3."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import SHAPE
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from attnres import Qwen3AttnResForCausalLM, load_model, wrap_qwen3
from attnres.errors import CheckpointError
from attnres.model.locate import locate
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


def sharded(model, folder: Path) -> dict[str, str]:
    """Saves a model in several files; which tensor is in which."""
    model.save_pretrained(folder, max_shard_size="40KB")
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]


@torch.no_grad()
def same(folder: Path, model, ids) -> bool:
    """Whether both ways of loading give the model."""
    models = (load_model(folder), Qwen3AttnResForCausalLM.from_pretrained(folder))
    return all(torch.equal(loaded(ids).logits, model(ids).logits) for loaded in models)


def test_load_model_takes_each_tensor_from_the_file_that_the_index_names(make_model, ids, tmp_path):
    model = make_model()
    places = sharded(model, tmp_path)
    first, last, digest = min(places.values()), max(places.values()), locate(str(tmp_path)).digest
    # Of an earlier model that was saved in more files, and of one whose last file had another tensor too.
    stale = {name: torch.zeros_like(tensor) for name, tensor in load_file(tmp_path / first).items()}
    save_file(stale, tmp_path / "model-00009-of-00009.safetensors", {"format": "pt"})
    nothing_else = locate(str(tmp_path)).digest == digest
    save_file(load_file(tmp_path / last) | stale, tmp_path / last, {"format": "pt"})
    assert same(tmp_path, model, ids) and nothing_else


def test_load_model_reads_files_of_any_name_that_the_index_gives(make_model, ids, tmp_path):
    model = make_model()
    places = sharded(model, tmp_path)
    (tmp_path / "parts").mkdir()
    renamed = {name: f"parts/{i}.safetensors" for i, name in enumerate(sorted(set(places.values())))}
    for old, new in renamed.items():
        (tmp_path / old).rename(tmp_path / new)
    written = {"metadata": {}, "weight_map": {tensor: renamed[name] for tensor, name in places.items()}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(written))
    assert same(tmp_path, model, ids)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda places: places | {"model.norm.weight": "../model.safetensors"}, "outside"),
        (lambda places: places | {"model.norm.weight": "gone.safetensors"}, "no file"),
        (lambda places: places | {"model.norm.weight": min(places.values())}, "do not agree about model.norm.weight"),
        (lambda places: {k: v for k, v in places.items() if k != "model.norm.weight"}, "agree about model.norm.weight"),
        (lambda places: {}, "no weight_map"),
    ],
)
def test_load_model_refuses_an_index_that_does_not_fit_its_files(make_model, tmp_path, change, told):
    places = sharded(make_model(), tmp_path)
    written = {"metadata": {}, "weight_map": change(places)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(written))
    for load in (load_model, Qwen3AttnResForCausalLM.from_pretrained):
        with pytest.raises(CheckpointError, match=told):
            load(tmp_path)


def test_load_model_refuses_shards_beside_a_single_file_which_the_library_leaves_there(make_model, ids, tmp_path):
    make_model(attnres_num_blocks=2).save_pretrained(tmp_path)
    model = make_model()
    sharded(model, tmp_path)
    for load in (load_model, Qwen3AttnResForCausalLM.from_pretrained):
        with pytest.raises(CheckpointError, match="may be two models"):
            load(tmp_path)
    # The other way round, the library leaves an index without its files.
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors.index.json").is_file() and same(tmp_path, model, ids)


@pytest.mark.parametrize("most", ["1GB", "40KB"])
@torch.no_grad()
def test_load_model_reads_the_only_variant(make_model, ids, tmp_path, most):
    model = make_model()
    model.save_pretrained(tmp_path, variant="fp16", max_shard_size=most)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"of another library")
    assert torch.equal(load_model(tmp_path)(ids).logits, model(ids).logits)
    before = locate(str(tmp_path)).digest
    assert len(before.split("-")) > 1
    # The files without a variant come first, as in transformers.
    other = make_model(attnres_num_blocks=2)
    other.save_pretrained(tmp_path, max_shard_size=most)
    assert torch.equal(load_model(tmp_path)(ids).logits, other(ids).logits)
    assert locate(str(tmp_path)).digest != before


def test_load_model_names_variants_where_there_are_several(make_model, tmp_path):
    for variant in ("fp16", "non-ema.bf16"):
        make_model().save_pretrained(tmp_path, variant=variant)
    with pytest.raises(CheckpointError, match=r"variants fp16, non-ema\.bf16 alone"):
        load_model(tmp_path)


def test_from_pretrained_of_a_released_folder_reads_the_variant_and_folder_that_are_asked_for(tmp_path):
    def negated(weights):
        return {name: -tensor for name, tensor in weights.items()}

    copy_of(SEEDED, tmp_path / "both")
    copy_of(SEEDED, tmp_path / "both" / "inner", weights=negated)
    shutil.copy(tmp_path / "both" / "inner" / "model.safetensors", tmp_path / "both" / "model.fp16.safetensors")
    plain, *others = (
        Qwen3AttnResForCausalLM.from_pretrained(tmp_path / "both", **asked).model.norm.weight
        for asked in ({}, {"variant": "fp16"}, {"subfolder": "inner"})
    )
    assert all(torch.equal(other, -plain) for other in others)


def claims_tied(model, folder: Path, *dropped: str) -> Path:
    """A checkpoint whose configuration ties the head to the embedding, without some tensors."""
    model.save_pretrained(folder)
    path, weights = folder / "config.json", load_file(folder / "model.safetensors")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": True}))
    save_file({k: v for k, v in weights.items() if k not in dropped}, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture
def untied(vanilla):
    """A vanilla Qwen3 whose head is not its embedding."""
    model = Qwen3ForCausalLM(Qwen3Config(**SHAPE | {"tie_word_embeddings": False})).eval()
    model.load_state_dict(vanilla.state_dict() | {"lm_head.weight": 0.1 * torch.randn(64, 32)})
    return model


@torch.no_grad()
def test_head_of_the_file_counts_where_the_configuration_ties_it(untied, ids, tmp_path, caplog):
    logits = untied(ids).logits
    plain = claims_tied(untied, tmp_path / "vanilla")
    ours = claims_tied(wrap_qwen3(untied, "uniform", 3), tmp_path / "ours")
    library = Qwen3ForCausalLM.from_pretrained(plain)
    assert library.config.tie_word_embeddings and torch.equal(library(ids).logits, logits)
    loads = (
        (lambda: load_model(plain), 1),
        (lambda: load_model(ours), 1),
        (lambda: wrap_qwen3(plain, "uniform", 3), 1),
        (lambda: wrap_qwen3(library, "uniform", 3), 1),
        (lambda: Qwen3AttnResForCausalLM.from_pretrained(ours), 0),  # of this the library says it
    )
    for load, lines in loads:
        caplog.clear()
        model = load()
        torch.testing.assert_close(model(ids).logits, logits, rtol=0, atol=1e-5)
        assert sum("tie_word_embeddings: false" in record.message for record in caplog.records) == lines
        model.save_pretrained(tmp_path / "again")
        assert json.loads((tmp_path / "again" / "config.json").read_text())["tie_word_embeddings"] is False
        assert torch.equal(load_model(tmp_path / "again")(ids).logits, model(ids).logits)
    assert torch.equal(library.lm_head.weight, untied.lm_head.weight)


@torch.no_grad()
def test_head_that_equals_the_embedding_stays_tied(vanilla, ids, tmp_path):
    weights = vanilla.state_dict()
    for dropped in ([], ["lm_head.weight"], ["model.embed_tokens.weight"]):
        folder = claims_tied(vanilla, tmp_path / "".join(dropped))
        save_file({k: v.clone() for k, v in weights.items() if k not in dropped}, folder / "model.safetensors")
        for model in (load_model(folder), wrap_qwen3(folder, "uniform", 3), wrap_qwen3(vanilla, "uniform", 3)):
            assert model.config.tie_word_embeddings and model.lm_head.weight is model.model.embed_tokens.weight
            torch.testing.assert_close(model(ids).logits, vanilla(ids).logits, rtol=0, atol=1e-5)


def test_load_model_refuses_an_untied_model_without_a_head(untied, tmp_path):
    untied.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(without("lm_head")(weights), tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="1 missing parameters .lm_head.weight"):
        load_model(tmp_path)


@pytest.mark.parametrize("schedule", ["recency", "uniform"])
@pytest.mark.parametrize("rounded", [False, True])
@torch.no_grad()
def test_wrap_of_a_bf16_model_keeps_its_rotary_frequencies(vanilla, tmp_path, schedule, rounded):
    vanilla.save_pretrained(tmp_path)
    base = Qwen3ForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert base.model.rotary_emb.inv_freq.dtype == torch.float32
    if rounded:  # a base that somebody cast as a whole is wrapped as it is
        base = base.to(torch.bfloat16)
    wrapped = wrap_qwen3(base, schedule, 3)
    assert {parameter.dtype for parameter in wrapped.parameters()} == {torch.bfloat16}
    assert wrapped.lm_head.weight is wrapped.model.embed_tokens.weight
    for name, buffer in base.named_buffers():
        found = wrapped.get_buffer(name)
        assert found.dtype == buffer.dtype and torch.equal(found, buffer) and found is not buffer
    far = torch.arange(2028, 2048).unsqueeze(0)
    hidden = torch.zeros(1, 20, 32, dtype=torch.bfloat16)
    for ours, theirs in zip(wrapped.model.rotary_emb(hidden, far), base.model.rotary_emb(hidden, far), strict=True):
        assert torch.equal(ours, theirs)


def test_unknown_words_are_refused_with_the_nearest_name(vanilla):
    with pytest.raises(TypeError, match="wrap_qwen3: unknown argument 'shedule'; did you mean 'schedule'"):
        wrap_qwen3(vanilla, shedule="uniform")
    with pytest.raises(TypeError, match="load_model: unknown argument 'dtyp'; did you mean 'dtype'"):
        load_model(SEEDED, dtyp=torch.float32)
    with pytest.raises(ValueError, match="bias: expected 'stored' or 'init', received 'strd'"):
        load_model(SEEDED, bias="strd")


def test_whoever_asks_for_the_list_of_what_does_not_fit_gets_it_and_the_model(make_model, tmp_path):
    make_model("block_sum").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="unexpected keys"):
        Qwen3AttnResForCausalLM.from_pretrained(tmp_path, attnres_sources="cumulative")
    model, info = Qwen3AttnResForCausalLM.from_pretrained(
        tmp_path, attnres_sources="cumulative", output_loading_info=True
    )
    assert model.config.attnres_sources == "cumulative"
    assert {name.partition("_")[0] for name in info["unexpected_keys"]} == {"model.final"}

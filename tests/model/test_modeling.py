"""The model: golden parity, edits, caching, checkpointing, isolation, initialisation."""

from pathlib import Path

import hydra
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from tiny_models import SHAPE
from transformers import AutoModelForCausalLM

from attnres import Qwen3AttnResConfig, Qwen3AttnResForCausalLM, load_model
from attnres.commands.hydra_door import CONF
from attnres.depth.plan import CONVENTIONS
from attnres.model.routing import is_bias, is_final, is_query, is_routing
from attnres.model.state import Site, Trace
from attnres.ops import reference
from attnres.training.models import model_config

GOLDEN = sorted(path for path in (Path(__file__).parents[1] / "golden").iterdir() if path.is_dir())


class Identity:
    """Changes nothing, everywhere or at the named reads."""

    def __init__(self, reads=None):
        self.reads = reads

    def names(self, site: Site) -> bool:
        return self.reads is None or site.read in self.reads

    def __call__(self, site, log_weights):
        return log_weights


class Remove(Identity):
    """Removes source 0."""

    def __call__(self, site, log_weights):
        removed = log_weights.clone()
        removed[..., 0] = -torch.inf
        return removed


def test_golden_fixtures_are_there():
    assert len(GOLDEN) == 3


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda path: path.name)
@torch.no_grad()
def test_load_model_matches_golden_logits_and_routing(folder):
    expected = load_file(folder / "expected.safetensors")
    output = load_model(folder)(expected["input_ids"], output_routing=True, use_cache=False)
    torch.testing.assert_close(output.logits, expected["logits"], rtol=0, atol=1e-5)
    routing = {name: tensor for name, tensor in expected.items() if name.startswith("routing.")}
    assert len(output.routing) == len(routing)
    for index, found in enumerate(output.routing):
        torch.testing.assert_close(found, routing[f"routing.{index:02d}"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("convention", CONVENTIONS)
@torch.no_grad()
def test_forward_equals_reads_over_the_plans_own_sources(make_model, ids, convention):
    """Every read recomputed in fp64 from sublayer outputs and the plan: no state, no blocks."""
    model = make_model(convention, torch.float64)
    traces: list[Trace] = []
    decoder = model.model
    embeddings = decoder.embed_tokens(ids)
    context = decoder.context(embeddings, observe=traces.append)
    outputs = []
    for layer in decoder.layers:
        layer.self_attn.register_forward_hook(lambda _m, _i, out: outputs.append(out[0]))
        layer.mlp.register_forward_hook(lambda _m, _i, out: outputs.append(out))
    state = decoder.embed(embeddings)
    for layer in range(6):
        state = decoder.step(state, layer, context)
    decoder.finish(state, context)
    for trace, read in zip(traces, decoder.plan.reads, strict=True):
        sources = [
            embeddings * source.embedding + sum(outputs[source.start : source.stop], torch.zeros_like(embeddings))
            for source in read.sources
        ]
        _, weights = reference.depth_mix(sources, *context.reads[read.index]())
        torch.testing.assert_close(torch.exp(trace.log_weights), weights, rtol=0, atol=1e-10)


@pytest.mark.parametrize("convention", CONVENTIONS)
@torch.no_grad()
def test_identity_edit_equals_the_fast_forward(make_model, ids, convention):
    model = make_model(convention)
    torch.testing.assert_close(model(ids, edit=Identity()).logits, model(ids).logits, rtol=0, atol=1e-5)
    assert torch.equal(model(ids, edit=Identity([])).logits, model(ids).logits)


@pytest.mark.parametrize("convention", CONVENTIONS)
@torch.no_grad()
def test_edit_at_one_site_leaves_earlier_sites_bitwise_unchanged(make_model, ids, convention):
    model = make_model(convention)
    clean = model(ids, output_routing=True)
    for site in (3, 6):
        edited = model(ids, output_routing=True, edit=Remove([site]))
        for read in range(site):
            assert torch.equal(edited.routing[read], clean.routing[read])
        assert bool((edited.routing[site][..., 0] == 0).all())
        assert not torch.equal(edited.logits, clean.logits)


@torch.no_grad()
def test_edit_that_removes_every_source_is_refused(make_model, ids):
    class RemoveAll(Identity):
        def __call__(self, site, log_weights):
            return torch.full_like(log_weights, -torch.inf)

    with pytest.raises(ValueError, match="every source of a row is removed at read 4"):
        make_model()(ids, edit=RemoveAll([4]))


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_generate_with_cache_equals_without(make_model, ids, convention):
    model = make_model(convention)
    torch.testing.assert_close(
        model.generate(ids, max_new_tokens=8, do_sample=False),
        model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=False),
    )


@torch.no_grad()
def test_cached_forward_equals_uncached_logits(make_model, ids):
    model = make_model()
    first = model(ids[:, :12], use_cache=True)
    second = model(ids[:, 12:], past_key_values=first.past_key_values, use_cache=True)
    joined = torch.cat([first.logits, second.logits], dim=1)
    torch.testing.assert_close(joined, model(ids, use_cache=False).logits, rtol=0, atol=1e-5)


def gradients(model, ids):
    model.zero_grad()
    model(ids, labels=ids, use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_gradient_checkpointing_gives_the_same_gradients(make_model, ids, convention, reentrant):
    model = make_model(convention).train()
    plain = gradients(model, ids)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    passes = []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda _m, _args: passes.append(1))
    checkpointed = gradients(model, ids)
    # Once forward and once again in the backward pass.
    assert len(passes) == 12
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        if reentrant:
            # A parameter that two layers use has its gradient added up in another order.
            torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-6, atol=1e-7, msg=name)
        else:
            assert torch.equal(gradient, checkpointed[name]), name


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*")
@pytest.mark.parametrize("reentrant", [True, False])
def test_loss_on_the_routing_has_the_same_gradients_under_checkpointing(make_model, ids, reentrant):
    model = make_model().train()

    def routed():
        model.zero_grad()
        sum(w.square().sum() for w in model(ids, output_routing=True, use_cache=False).routing).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = routed()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    checkpointed = routed()
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*")
@pytest.mark.parametrize("reentrant", [None, True, False])
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_observe_is_called_once_for_every_read(make_model, ids, convention, reentrant):
    model = make_model(convention).train()
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    traces: list[Trace] = []
    loss = model(ids, labels=ids, use_cache=False, observe=traces.append).loss
    loss.backward()
    assert [trace.site.read for trace in traces] == [read.index for read in model.model.plan.reads]
    weights = [torch.exp(trace.log_weights).detach() for trace in traces]
    model.gradient_checkpointing_disable()
    for ours, theirs in zip(weights, model(ids, output_routing=True, use_cache=False).routing, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*")
def test_gradient_checkpointing_of_every_second_layer(make_model, ids):
    model = make_model().train()
    plain = gradients(model, ids)
    model.gradient_checkpointing_enable({"use_reentrant": False}, every_n_layers=2)
    passes = []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda _m, _args: passes.append(1))
    checkpointed = gradients(model, ids)
    assert len(passes) == 9
    for name, gradient in plain.items():
        assert torch.equal(gradient, checkpointed[name]), name


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_every_trainable_parameter_gets_a_gradient_and_no_other(make_model, ids, convention):
    model = make_model(convention).train()
    found = gradients(model, ids)
    wanted = {name for name, p in model.named_parameters() if p.requires_grad}
    assert found.keys() == wanted
    # Unreachable ones would make a distributed run wait.
    assert all(bool(found[name].abs().sum() > 0) for name in wanted if "res_proj" in name)


def test_the_embedding_of_a_separator_that_also_pads_is_a_row_like_the_others(make_model, ids):
    model = make_model(pad_token_id=0, eos_token_id=0, tie_word_embeddings=False).train()
    assert bool(model.model.embed_tokens.weight[0].abs().sum() > 0)
    found = gradients(model, ids.clone().fill_(0))["model.embed_tokens.weight"]
    assert bool(found[0].abs().sum() > 0)


def test_parameters_without_a_gradient_do_not_require_one(make_model):
    frozen = {name for name, p in make_model("block_sum").named_parameters() if not p.requires_grad}
    prefix = "model.layers.0.attn_res_"
    assert frozen == {prefix + "proj.weight", prefix + "norm.weight", prefix + "bias"}


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_stored_reads_are_the_routing_parameters_in_the_order_of_the_plan(make_model, convention):
    model = make_model(convention)
    reads, names = model.model.stored_reads(), {id(p): name for name, p in model.named_parameters()}
    assert len(reads) == len(model.model.plan.reads)
    assert {id(p) for read in reads for p in read} == {key for key, name in names.items() if is_routing(name)}
    for read, plan in zip(reads, model.model.plan.reads, strict=True):
        owner = "model" if plan.sublayer == "final" else f"model.layers.{plan.layer}"
        start = f"{owner}.{plan.sublayer}_res_"
        assert [names[id(p)] for p in read] == [start + end for end in ("proj.weight", "norm.weight", "bias")]
        assert is_query(names[id(read.query)]) and is_bias(names[id(read.bias)])
        assert all(is_final(names[id(p)]) == (plan.sublayer == "final") for p in read)


def test_new_model_starts_uniform(ids):
    config = Qwen3AttnResConfig(**SHAPE, attnres_num_blocks=3)
    routing = Qwen3AttnResForCausalLM(config)(ids, output_routing=True).routing
    for weights in routing:
        torch.testing.assert_close(weights, torch.full_like(weights, 1 / weights.shape[-1]), rtol=0, atol=1e-6)


@torch.no_grad()
def test_bias_only_routing_ignores_content(ids):
    torch.manual_seed(0)
    config = Qwen3AttnResConfig(**SHAPE, attnres_num_blocks=3, attnres_bias="sources", attnres_content=False)
    model = Qwen3AttnResForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("_res_bias"):
            parameter.normal_()
    for weights in model(ids, output_routing=True).routing:
        torch.testing.assert_close(weights, weights[:1, :1].expand_as(weights), rtol=0, atol=1e-6)
    assert not any(p.requires_grad for n, p in model.named_parameters() if "res_proj" in n)


@torch.no_grad()
def test_position_ids_isolate_packed_documents_exactly(make_model, ids):
    """With positions that restart, what the first document says changes nothing in the second."""
    model = make_model()
    positions = torch.cat([torch.arange(8), torch.arange(12)]).expand(2, -1)
    changed = ids.clone()
    changed[:, :8] = (changed[:, :8] + 1) % 64
    kwargs = {"position_ids": positions, "use_cache": False}
    assert torch.equal(model(ids, **kwargs).logits[:, 8:], model(changed, **kwargs).logits[:, 8:])
    assert not torch.equal(model(ids).logits[:, 8:], model(changed).logits[:, 8:])


def test_autocast_keeps_all_sources_in_one_dtype(make_model, ids):
    model = make_model().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(ids, labels=ids).loss
    loss.backward()
    assert bool(loss.isfinite())
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_layers_give_the_same_gradients(make_model, ids, autocast):
    model = make_model(num_hidden_layers=2, attnres_num_blocks=2).train()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        plain = gradients(model, ids)
        for layer in model.model.layers:
            layer.compile(backend="aot_eager", fullgraph=True)
        compiled = gradients(model, ids)
    tolerance = 2e-2 if autocast else 1e-5
    for name, gradient in plain.items():
        torch.testing.assert_close(compiled[name], gradient, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("convention", CONVENTIONS)
@torch.no_grad()
def test_save_and_load_through_auto_classes(make_model, ids, tmp_path, convention):
    model = make_model(convention)
    model.save_pretrained(tmp_path)
    for loaded in (AutoModelForCausalLM.from_pretrained(tmp_path), load_model(tmp_path)):
        assert type(loaded) is Qwen3AttnResForCausalLM
        assert loaded.config.attnres_sources == convention
        assert torch.equal(loaded.eval()(ids).logits, model(ids).logits)


def test_parameter_count_of_the_0p6b_shape():
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        plain = OmegaConf.to_container(hydra.compose("train", ["+experiment=attnres_0p6b"]).model)
    config = model_config(plain, 151669, 0, 2048)
    with torch.device("meta"):
        model = Qwen3AttnResForCausalLM(config)
    routing = sum(p.numel() for name, p in model.named_parameters() if is_routing(name))
    assert sum(p.numel() for p in model.parameters()) - routing == 596_049_920
    assert routing == 57 * (2 * 1024 + 1)

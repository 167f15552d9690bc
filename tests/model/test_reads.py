"""Reads as modules: what libraries and plain hooks meet where a block reads, and the norm behind a read."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from attnres.depth.plan import CONVENTIONS
from attnres.model.routing import is_routing


def norms(model):
    """Every norm that stands behind a read or at the end, by name."""
    return {name: module for name, module in model.named_modules() if name.endswith(("layernorm", "model.norm"))}


@pytest.mark.parametrize("exact_uniform", [False, True])
@pytest.mark.parametrize("convention", CONVENTIONS)
@torch.no_grad()
def test_hook_on_every_norm_is_called_once_with_what_the_norm_sees(make_model, ids, convention, exact_uniform):
    model = make_model(convention, attnres_exact_uniform=exact_uniform)
    plain = model(ids, use_cache=False).logits
    for name, norm in norms(model).items():
        seen = []
        handle = norm.register_forward_hook(lambda _m, args, out, seen=seen: seen.append((args[0], out)))
        hooked = model(ids, use_cache=False).logits
        handle.remove()
        ((h, normed),) = seen
        torch.testing.assert_close(hooked, plain, rtol=0, atol=2e-6, msg=name)
        assert torch.equal(norm.forward(h), normed), name
    assert len(norms(model)) == 13


@pytest.mark.parametrize("exact_uniform", [False, True])
@torch.no_grad()
def test_norm_that_is_called_equals_the_fused_one(make_model, ids, exact_uniform):
    """What every sublayer and the head see, to 1e-6; under an eps that matters."""
    model = make_model("block_sum", attnres_exact_uniform=exact_uniform, rms_norm_eps=1e-3)
    seen = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda _m, _a, given: seen.append(given["hidden_states"]), with_kwargs=True
        )
        layer.mlp.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    seen.append(model.model(ids, use_cache=False).last_hidden_state)
    for norm in norms(model).values():
        norm.register_forward_pre_hook(lambda _m, _args: None)
    seen.append(model.model(ids, use_cache=False).last_hidden_state)
    assert len(seen) == 26
    for fused, called in zip(seen[:13], seen[13:], strict=True):
        torch.testing.assert_close(called, fused, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_output_of_a_hook_on_a_norm_is_what_the_model_goes_on_with(make_model, ids):
    model = make_model()
    model.model.norm.register_forward_hook(lambda _m, _args, out: torch.zeros_like(out))
    assert bool((model(ids).logits == 0).all())


class Doubled(nn.Module):
    """A norm that a library has put in place of ours."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.inner = norm

    def forward(self, x):
        return 2 * self.inner(x)


@torch.no_grad()
def test_norm_of_another_class_or_with_another_forward_is_called(make_model, ids):
    model = make_model()
    expected = 2 * model(ids).logits
    replaced, wrapped = copy.deepcopy(model), copy.deepcopy(model)
    replaced.model.norm = Doubled(replaced.model.norm)
    forward = wrapped.model.norm.forward
    wrapped.model.norm.forward = lambda x: 2 * forward(x)
    for changed in (replaced, wrapped):
        torch.testing.assert_close(changed(ids).logits, expected, rtol=0, atol=2e-6)


def test_gradients_through_called_norms_equal_those_through_fused_ones(make_model, ids):
    model = make_model().train()

    def gradients():
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    fused = gradients()
    for norm in norms(model).values():
        norm.register_forward_hook(lambda _m, _args, out: None)
    called = gradients()
    assert called.keys() == fused.keys()
    for name, gradient in fused.items():
        torch.testing.assert_close(called[name], gradient, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("convention", CONVENTIONS)
@torch.no_grad()
def test_call_of_a_read_returns_its_query_key_weight_and_bias(make_model, ids, convention):
    model = make_model(convention)
    calls = []
    for name, module in model.named_modules():
        if name.endswith("_res"):
            module.register_forward_hook(lambda _m, _args, out, name=name: calls.append((name, out)))
    model(ids, use_cache=False)
    reads = dict(calls)
    assert len(reads) == len(model.model.plan.reads)
    for read, stored in zip(model.model.plan.reads, model.model.stored_reads(), strict=True):
        owner = "model" if read.sublayer == "final" else f"model.layers.{read.layer}"
        query, key_weight, bias = reads[f"{owner}.{read.sublayer}_res"]
        assert torch.equal(query, stored.query[0]) and torch.equal(key_weight, stored.key_weight)
        assert bias.shape == (read.num_sources,) and torch.equal(bias[-1:], stored.bias[-1:])


@pytest.mark.parametrize("biases", ["newest", "sources"])
@pytest.mark.parametrize("convention", CONVENTIONS)
@torch.no_grad()
def test_layer_whose_parameters_are_there_only_in_its_own_forward(make_model, ids, convention, biases):
    """As under offloading and sharding by layer: the parameters are brought to the forward and taken away after it."""
    model = make_model(convention, torch.float64, attnres_bias=biases)
    expected = model(ids, use_cache=False, output_routing=True)
    for layer in model.model.layers[2:5]:
        bring_only_to_its_forward(layer)
    assert model.model.layers[3].attn_res_bias.is_meta
    found = model(ids, use_cache=False, output_routing=True)
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-6)
    for ours, theirs in zip(found.routing, expected.routing, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def bring_only_to_its_forward(layer):
    owners = [(m, name) for m in layer.modules() for name, value in m._parameters.items() if value is not None]
    held = [module._parameters[name] for module, name in owners]
    forward = layer.forward

    def take_away():
        for (module, name), value in zip(owners, held, strict=True):
            module._parameters[name] = nn.Parameter(value.to("meta"), requires_grad=False)

    def brought(*args):
        for (module, name), value in zip(owners, held, strict=True):
            module._parameters[name] = value
        try:
            return forward(*args)
        finally:
            take_away()

    layer.forward = brought
    take_away()


def test_no_linear_layer_and_no_norm_belongs_to_a_read(make_model):
    model = make_model()
    modules = {name: module for name, module in model.named_modules() if is_routing(f"{name}.weight")}
    assert len(modules) == 26
    for name, module in modules.items():
        assert not isinstance(module, nn.Linear) and "Norm" not in type(module).__name__, name


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated", "ignore:.*quantized tensor creation")
@torch.no_grad()
def test_dynamic_quantisation_leaves_the_reads_alone(make_model, ids):
    model = make_model()
    loss = float(model(ids, labels=ids).loss)
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert 0 < abs(float(quantised(ids, labels=ids).loss) - loss) < 0.01


@torch.no_grad()
def test_state_is_a_tuple_of_tensors_and_a_context_can_move(make_model, ids):
    """Libraries that move, cast or checkpoint the arguments of a layer find the tensors inside."""
    decoder = make_model().model
    embeddings = decoder.embed_tokens(ids)
    context = decoder.context(embeddings, attention_mask=torch.ones_like(ids))
    state = decoder.step(decoder.embed(embeddings), 0, context)
    leaves = [leaf for leaf in tree_leaves(state) if leaf is not None]
    assert len(leaves) == 9 and all(isinstance(leaf, torch.Tensor) for leaf in leaves)
    moved = context.to("meta")
    tensors = [*moved.position_embeddings, moved.position_ids]
    assert all(tensor.is_meta for tensor in tensors) and not context.position_ids.is_meta
    assert moved.reads is context.reads

"""Every keyword argument of a forward pass is obeyed or refused, under the names of each release of transformers."""

import inspect
import warnings

import pytest
import torch
from tiny_models import SHAPE
from transformers import AutoConfig, CompileConfig
from transformers.cache_utils import DynamicCache
from transformers.utils import TransformersKwargs

from attnres import Qwen3AttnResConfig, Qwen3AttnResForCausalLM, wrap_qwen3
from attnres.model import keywords

CONVENTIONS = ("block_sum", "seeded_block_sum", "cumulative", "full")


def random_model(seed: int) -> Qwen3AttnResForCausalLM:
    torch.manual_seed(seed)
    convention = CONVENTIONS[seed % 4]
    fields = {"attnres_sources": convention, "attnres_num_blocks": 3, "initializer_range": 0.3, "pad_token_id": 0}
    return Qwen3AttnResForCausalLM(Qwen3AttnResConfig(**SHAPE, **fields)).eval()


def greedy_by_hand(model, ids: torch.Tensor, new: int) -> torch.Tensor:
    for _ in range(new):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids


@pytest.mark.parametrize("seed", range(10))
@torch.no_grad()
def test_generate_equals_greedy_decoding_by_hand(ids, seed):
    model, ids = random_model(seed), ids[:, :9].clamp(min=1)
    expected = greedy_by_hand(model, ids, 8)
    arguments = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    for cache in ({}, {"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}):
        assert torch.equal(model.generate(ids, **arguments, **cache), expected), cache


def test_compiled_generation_equals_greedy_decoding_by_hand(make_model, ids):
    model = make_model(num_hidden_layers=2, attnres_num_blocks=2)
    compile_config = CompileConfig(backend="eager", fullgraph=True)
    # The library compiles on a CPU only where this is set.
    compile_config._compile_all_devices = True
    compiled, inner = [], model.get_compiled_call
    model.get_compiled_call = lambda config: compiled.append(config) or inner(config)
    prompt = ids[:, :9].clamp(min=1)
    arguments = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(prompt), "pad_token_id": 0}
    found = model.generate(prompt, cache_implementation="static", compile_config=compile_config, **arguments)
    assert compiled
    with torch.no_grad():
        assert torch.equal(found, greedy_by_hand(model, prompt, 4))


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
@torch.no_grad()
def test_the_cache_goes_by_both_names_in_arguments_and_outputs(make_model, ids, name):
    model = make_model()
    expected = model(ids, use_cache=False).logits[:, 12:]
    for part in (model, model.model):
        with warnings.catch_warnings():
            # The library warns where its mask or attention is given the old name.
            warnings.simplefilter("error")
            given = DynamicCache(config=model.config)
            first = part(ids[:, :12], **{name: given}, use_cache=True)
            assert getattr(first, name) is given and first[name] is given
            second = part(ids[:, 12:], **{name: given}, use_cache=True)
        assert given.get_seq_length() == ids.shape[1]
        logits = second.logits if part is model else model.lm_head(second.last_hidden_state)
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
        assert getattr(part(ids, use_cache=False), name) is None
        with pytest.raises(ValueError, match="two names of one argument"):
            part(ids, past_key_values=given, cache=given)


def test_the_loss_follows_the_number_of_items_in_the_batch(make_model, ids):
    model = make_model()
    loss, targets = model(ids, labels=ids).loss, ids[:, 1:].numel()
    for items in (100, torch.tensor(100)):
        torch.testing.assert_close(model(ids, labels=ids, num_items_in_batch=items).loss, loss * targets / 100)


def test_labels_that_are_shifted_already_are_used_as_they_are(make_model, ids):
    model = make_model()
    shifted = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], dim=1)
    expected = model(ids, labels=ids).loss
    for labels in (None, ids):
        torch.testing.assert_close(model(ids, labels=labels, shift_labels=shifted).loss, expected)
    # The Trainer asks for every argument with this in its name, and evaluates without a loss where one lacks.
    assert [name for name in inspect.signature(model.forward).parameters if "label" in name] == ["labels"]


def test_accumulated_batches_give_the_loss_and_gradients_of_the_whole_batch(make_model):
    """8x1, 2x4 and 1x8, with targets that differ in number between the rows."""
    batch = torch.randint(0, 64, (8, 20), generator=torch.Generator().manual_seed(2))
    labels = batch.masked_fill(torch.arange(20) >= torch.arange(6, 22, 2)[:, None], -100)
    items = (labels[:, 1:] != -100).sum()
    model, seen = make_model().train(), []
    for rows in (1, 2, 8):
        model.zero_grad()
        losses = [
            model(ids, labels=targets, num_items_in_batch=items).loss
            for ids, targets in zip(batch.split(rows), labels.split(rows), strict=True)
        ]
        sum(losses).backward()
        seen.append((sum(losses).item(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    for loss, gradients in seen[1:]:
        assert loss == pytest.approx(seen[0][0], abs=1e-6)
        for mine, first in zip(gradients, seen[0][1], strict=True):
            torch.testing.assert_close(mine, first, rtol=0, atol=1e-6)


def test_every_word_of_the_installed_transformers_is_decided_upon(make_model):
    """A release with a new word fails here, until it is obeyed or stands among the refused ones with the reason."""
    obeyed = set(inspect.signature(make_model().model.forward).parameters)
    assert set(TransformersKwargs.__annotations__) <= obeyed | set(keywords.REFUSED)


@pytest.mark.parametrize("part", ["model", "decoder"])
@pytest.mark.parametrize(
    ("word", "meant"), [("output_routng", "output_routing"), ("edti", "edit"), ("obseve", "observe")]
)
def test_an_unknown_argument_is_refused_with_the_nearest_name(make_model, ids, part, word, meant):
    model = make_model()
    with pytest.raises(TypeError, match=f"unknown argument '{word}'; did you mean '{meant}'"):
        (model if part == "model" else model.model)(ids, **{word: None})
    with pytest.raises(TypeError, match=word):
        model.model.context(model.model.embed_tokens(ids), **{word: None})


@torch.no_grad()
def test_a_known_argument_is_obeyed_or_refused(make_model, ids):
    model = make_model()
    nothing = dict.fromkeys(keywords.REFUSED) | {"is_causal": True, "token_type_ids": torch.zeros_like(ids)}
    nothing |= {"cache_position": torch.arange(20), "output_router_logits": False}
    assert torch.equal(model(ids, **nothing).logits, model(ids).logits)
    something = {"is_causal": False, "token_type_ids": torch.ones_like(ids), "cache_position": torch.arange(20) + 1}
    something |= {"output_router_logits": True, "seq_idx": torch.zeros_like(ids), "num_items_in_batch": 3}
    for name, value in (something | dict.fromkeys(keywords.FLASH, torch.tensor([0, 20]))).items():
        with pytest.raises(ValueError, match=f"{name} is not supported"):
            model.model(ids, **{name: value})


@torch.no_grad()
def test_return_dict(make_model, ids):
    model = make_model()
    logits = model(ids).logits
    for arguments, configured in (({"return_dict": False}, True), ({}, False)):
        model.config.return_dict = configured
        answer = model(ids, **arguments)
        assert isinstance(answer, tuple) and torch.equal(answer[0], logits)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_hidden_states_are_what_the_attention_of_each_layer_reads(make_model, ids, convention):
    model = make_model(convention)
    traces = []
    plain = model(ids)
    assert plain.hidden_states is None
    answer = model(ids, output_hidden_states=True, output_routing=True, observe=traces.append)
    embedding, *inner, last = answer.hidden_states
    assert torch.equal(embedding, model.model.embed_tokens(ids))
    torch.testing.assert_close(model.lm_head(last), plain.logits, rtol=0, atol=1e-6)
    assert len(inner) == model.config.num_hidden_layers - 1
    assert len(traces) == len(answer.routing) == len(model.model.plan.reads)
    reads = [trace for trace in traces if trace.site.sublayer == "attn"][1:]
    for trace, hidden in zip(reads, inner, strict=True):
        mix = torch.einsum("bts,sbtd->btd", trace.log_weights.exp(), torch.stack(trace.sources))
        torch.testing.assert_close(hidden, mix, rtol=0, atol=1e-6)
    # The first lies on the path to the logits, as in transformers.
    embedding.retain_grad()
    answer.logits.sum().backward()
    assert embedding.grad is not None
    with pytest.raises(ValueError, match="give True or False"):
        model(ids, output_hidden_states=[0])


@torch.no_grad()
def test_a_logit_lens_on_the_uniform_wrap_is_that_of_its_base(vanilla, ids):
    wrapped = wrap_qwen3(vanilla, schedule="uniform", num_blocks=3)
    ours, base = (model(ids, output_hidden_states=True).hidden_states for model in (wrapped, vanilla))
    assert len(ours) == len(base)
    # The mean of S sources, of which the base has the sum; the last is behind the norm, which takes the factor away.
    factors = [read.num_sources for read in wrapped.model.plan.reads if read.sublayer == "attn"] + [1]
    for mine, theirs, factor in zip(ours, base, factors, strict=True):
        torch.testing.assert_close(factor * mine, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_attentions_are_those_of_the_base(vanilla, ids, attention):
    wrapped = wrap_qwen3(vanilla, schedule="uniform", num_blocks=3)
    wrapped.set_attn_implementation(attention)
    vanilla.set_attn_implementation("eager")
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    ours, base = (model(ids, attention_mask=mask, output_attentions=True).attentions for model in (wrapped, vanilla))
    for mine, theirs in zip(ours, base, strict=True):
        torch.testing.assert_close(mine[:, :, 5:], theirs[:, :, 5:], rtol=0, atol=1e-5)
    assert wrapped.config._attn_implementation == attention
    assert wrapped(ids).attentions is None


@pytest.mark.parametrize(
    ("field", "meant"), [("attnres_num_block", "attnres_num_blocks"), ("num_hiden_layers", "num_hidden_layers")]
)
def test_a_misspelt_field_of_the_configuration_is_refused_with_the_nearest_name(tmp_path, field, meant):
    message = f"unknown field '{field}'; did you mean '{meant}'"
    with pytest.raises(ValueError, match=message):
        Qwen3AttnResConfig(**{field: 3})
    Qwen3AttnResConfig(**SHAPE, attnres_num_blocks=3).save_pretrained(tmp_path)
    for read in (Qwen3AttnResConfig.from_pretrained, AutoConfig.from_pretrained):
        with pytest.raises(ValueError, match=message):
            read(tmp_path, **{field: 3})


def test_a_configuration_keeps_what_other_tools_write_and_computes_what_it_names():
    config = Qwen3AttnResConfig(attnres_mode="block", attnres_gate_type="bias", other_tools_version="1")
    assert config.other_tools_version == "1"
    with pytest.raises(ValueError, match="attnres_mode='full' is not supported"):
        Qwen3AttnResConfig(attnres_mode="full")

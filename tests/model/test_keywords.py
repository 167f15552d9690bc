"""Every keyword argument of a forward pass is obeyed or refused, under the names of each release of transformers."""

import warnings

import pytest
import torch
from tiny_models import SHAPE
from transformers.cache_utils import DynamicCache

from attnres import Qwen3AttnResConfig, Qwen3AttnResForCausalLM

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
    for cache in ({}, {"use_cache": False}):
        assert torch.equal(model.generate(ids, **arguments, **cache), expected), cache


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

"""Packed documents are separated whatever mask and cache they come with, and padding is no document."""

import pytest
import torch
from transformers.cache_utils import DynamicCache, StaticCache

FIRST, SECOND = 8, 12
# What the positions say: two documents, of 8 and 12 tokens.
POSITIONS = torch.cat([torch.arange(FIRST), torch.arange(SECOND)])[None]

CAUSAL = torch.ones(20, 20, dtype=torch.bool).tril()[None, None].expand(2, 1, -1, -1)
MASKS = {
    "none": None,
    "ones": torch.ones(2, 20, dtype=torch.long),
    "made, bool": CAUSAL,
    "made, added": torch.zeros(2, 1, 20, 20).masked_fill(~CAUSAL, torch.finfo(torch.float32).min),
}
CACHES = {
    "none": lambda config: {"use_cache": False},
    "default": lambda config: {},
    "empty": lambda config: {"past_key_values": DynamicCache(config=config)},
    "static": lambda config: {"past_key_values": StaticCache(config=config, max_cache_len=30)},
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("mask", MASKS)
@torch.no_grad()
def test_packed_documents_are_what_each_is_alone(make_model, ids, mask, cache, attention):
    if cache == "static" and mask.startswith("made"):
        pytest.skip("these masks of 20 keys do not fit a cache of 30")
    model = make_model(num_hidden_layers=2, attnres_num_blocks=2)
    model.set_attn_implementation(attention)
    packed = model(ids, attention_mask=MASKS[mask], position_ids=POSITIONS, **CACHES[cache](model.config)).logits
    alone = [model(part, use_cache=False).logits for part in ids.split([FIRST, SECOND], dim=1)]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=0, atol=1e-6)


@torch.no_grad()
def test_padding_between_and_behind_packed_documents_separates_nothing_else(make_model, ids):
    model = make_model(num_hidden_layers=2, attnres_num_blocks=2)
    mask = torch.ones_like(ids)
    mask[:, [0, 1, 5, 12, 18, 19]] = 0
    # Tokens 2-9 are a document and 10-17 another, with a hole in each; padding has position 0, as generation gives it.
    document = (torch.arange(20) >= 10).long()
    positions = torch.zeros_like(ids)
    for number in (0, 1):
        mine = mask[0].bool() & (document == number)
        positions[:, mine] = torch.arange(int(mine.sum()))
    logits = model(ids, attention_mask=mask, position_ids=positions).logits
    for number in (0, 1):
        mine = mask[0].bool() & (document == number)
        torch.testing.assert_close(logits[:, mine], model(ids[:, mine]).logits, rtol=0, atol=1e-6)


@torch.no_grad()
def test_a_prompt_padded_on_the_left_is_continued_as_without_padding(make_model, ids):
    model = make_model()
    padded = torch.cat([torch.zeros(2, 4, dtype=torch.long), ids.clamp(min=1)], dim=1)
    arguments = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(padded[:, 4:], attention_mask=torch.ones_like(ids), **arguments)
    for how in ({}, {"prefill_chunk_size": 3}, {"cache_implementation": "static", "disable_compile": True}):
        found = model.generate(padded, attention_mask=(padded != 0).long(), **arguments, **how)
        assert torch.equal(found[:, 4:], expected), how


@pytest.mark.parametrize("cache", [DynamicCache, lambda config: StaticCache(config=config, max_cache_len=30)])
@torch.no_grad()
def test_a_document_begins_behind_a_filled_cache(make_model, ids, cache):
    model = make_model(num_hidden_layers=2, attnres_num_blocks=2)
    alone = [model(part, use_cache=False).logits for part in ids.split([FIRST, SECOND], dim=1)]
    # The cached document goes on for two tokens; and the second one begins at once.
    for cut in (FIRST - 2, FIRST):
        filled = cache(config=model.config)
        model(ids[:, :cut], position_ids=POSITIONS[:, :cut], past_key_values=filled)
        logits = model(ids[:, cut:], position_ids=POSITIONS[:, cut:], past_key_values=filled).logits
        torch.testing.assert_close(logits, torch.cat(alone, dim=1)[:, cut:], rtol=0, atol=1e-6)
    # Now the cache holds two.
    with pytest.raises(ValueError, match="the cache holds packed documents"):
        model(ids[:, :1], position_ids=torch.tensor([[SECOND]]), past_key_values=filled)


def test_a_cache_is_good_again_once_it_is_emptied(make_model, ids):
    model = make_model(num_hidden_layers=2, attnres_num_blocks=2)
    cache = StaticCache(config=model.config, max_cache_len=30)
    model(ids, position_ids=POSITIONS, past_key_values=cache)
    cache.reset()
    model(ids, position_ids=torch.arange(20)[None], past_key_values=cache)
    model(ids[:, :1], position_ids=torch.tensor([[20]]), past_key_values=cache)


@pytest.mark.parametrize(
    ("rows", "mask", "first"), [(2, None, 0), (1, torch.arange(20)[None] > 0, 0), (1, None, 3)], ids=str
)
def test_flash_attention_is_refused_what_it_does_not_separate(make_model, ids, rows, mask, first):
    model = make_model(num_hidden_layers=2, attnres_num_blocks=2)
    embeddings = model.model.embed_tokens(ids[:rows])
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="flash attention separates packed documents only in a single row"):
        model.model.context(embeddings, mask, POSITIONS + first)

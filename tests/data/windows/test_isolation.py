"""Documents that share a window are strangers to the model: batches of the DataModule through both architectures."""

import dataclasses

import pytest
import torch

from attnres.data import TextDataModule
from attnres.training.models import build_model, model_config

SHAPE = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "initializer_range": 0.3,
}  # fmt: skip
LENGTH = 2500


@torch.no_grad()
@pytest.mark.parametrize("kind", ["attnres", "vanilla"])
def test_isolated_documents_change_no_logit_of_another(corpus, config, kind):
    isolated = dataclasses.replace(config, isolate_documents=True, sequence_length=LENGTH)
    batch = next(iter(TextDataModule(corpus, isolated, 1, 1, steps=range(1)).train_dataloader()))
    blocks = {"attnres_num_blocks": 2} if kind == "attnres" else {}
    settings = {"kind": kind} | SHAPE | blocks
    model = build_model(model_config(settings, corpus.vocab_size, corpus.eos_id, LENGTH), seed=0).eval()
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    ids, positions = batch["input_ids"], batch["position_ids"]
    owner = (positions == 0).cumsum(dim=1)
    assert owner.max() >= 3
    clean = model(ids, position_ids=positions, use_cache=False).logits
    for document in range(1, int(owner.max()) + 1):
        mine = owner == document
        other = torch.where(mine, (ids + 1) % corpus.vocab_size, ids)
        changed = model(other, position_ids=positions, use_cache=False).logits
        assert (changed - clean)[~mine].abs().max() == 0
        assert (changed - clean)[mine].abs().max() > 0

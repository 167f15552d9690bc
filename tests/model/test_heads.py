"""The library's heads for other tasks than language modelling, through its Auto classes."""

import pytest
import torch
from tiny_models import SHAPE
from transformers import (
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

CONVENTIONS = ("block_sum", "seeded_block_sum", "cumulative", "full")
HEADS = {
    AutoModelForSequenceClassification: ({"labels": torch.tensor([0, 2])}, "logits", (2, 3)),
    AutoModelForTokenClassification: ({"labels": torch.zeros(2, 20, dtype=torch.long)}, "logits", (2, 20, 3)),
    AutoModelForQuestionAnswering: (
        {"start_positions": torch.tensor([0, 1]), "end_positions": torch.tensor([2, 3])},
        "start_logits",
        (2, 20),
    ),
}


@pytest.mark.parametrize("convention", CONVENTIONS)
@torch.no_grad()
def test_auto_model_is_the_decoder(make_model, ids, tmp_path, convention):
    model = make_model(convention, tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    decoder = AutoModel.from_pretrained(tmp_path).eval()
    assert torch.equal(decoder(ids).last_hidden_state, model.model(ids).last_hidden_state)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_a_head_starts_on_a_language_model_and_comes_back_from_its_file(make_model, ids, tmp_path, convention, head):
    labels, name, shape = HEADS[head]
    model = make_model(convention, tie_word_embeddings=False, pad_token_id=0)
    model.save_pretrained(tmp_path / "language")
    fresh = head.from_pretrained(tmp_path / "language", num_labels=3).eval()
    assert torch.equal(fresh.model(ids).last_hidden_state, model.model(ids).last_hidden_state)
    answer = fresh(ids, **labels, output_hidden_states=True)
    assert getattr(answer, name).shape == shape and len(answer.hidden_states) == SHAPE["num_hidden_layers"] + 1
    answer.loss.backward()
    assert all(p.grad is not None for p in fresh.parameters() if p.requires_grad)
    fresh.save_pretrained(tmp_path / "head")
    again = head.from_pretrained(tmp_path / "head").eval()
    assert torch.equal(getattr(again(ids), name), getattr(answer, name))


@pytest.mark.parametrize("head", HEADS)
def test_a_head_refuses_what_it_cannot_give_and_what_does_not_fit_below_it(make_model, ids, tmp_path, head):
    model = make_model()
    model.save_pretrained(tmp_path)
    fresh = head.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="output_routing: this head's output has no room for it"):
        fresh(ids, output_routing=True)
    with pytest.raises(TypeError, match="did you mean 'output_routing'"):
        fresh(ids, output_routng=True)
    with pytest.raises(ValueError, match="unexpected keys"):
        head.from_pretrained(tmp_path, attnres_sources="cumulative")


def test_a_head_of_another_size_is_drawn_anew_where_that_is_asked_for(make_model, tmp_path):
    make_model(pad_token_id=0).save_pretrained(tmp_path / "language")
    three = AutoModelForSequenceClassification.from_pretrained(tmp_path / "language", num_labels=3)
    three.save_pretrained(tmp_path / "three")
    with pytest.raises((RuntimeError, ValueError), match="mismatch"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "three", num_labels=5)
    five = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "three", num_labels=5, ignore_mismatched_sizes=True
    )
    assert five.score.weight.shape[0] == 5
    assert torch.equal(five.model.embed_tokens.weight, three.model.embed_tokens.weight)

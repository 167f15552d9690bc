"""Ids of a text that is encoded in pieces."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

import attnres.data.text.tokenizer
from attnres.data.text.tokenizer import encode, end_of_text_id
from attnres.errors import DataError


def regex_tokenizer() -> Tokenizer:
    """Bytes and a few merges behind Qwen's pre-tokenizer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "a"), ("a", "b"), ("Ċ", "Ċ"), ("Ġ", "Ġ"), ("ab", "c"), ("Ġa", "b")]
    vocabulary = {token: index for index, token in enumerate([*alphabet, *(a + b for a, b in merges)])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    pattern = Regex(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
        r"\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(pattern, "isolated"), to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@settings(deadline=None, max_examples=60)
@given(text=st.text("ab c\n  '1é.", min_size=1, max_size=900), qwen=st.booleans())
def test_encode_in_pieces_gives_the_ids_of_the_whole_text(corpus, text, qwen):
    tokenizer = regex_tokenizer() if qwen else corpus.tokenizer
    patch = pytest.MonkeyPatch()
    patch.setattr(attnres.data.text.tokenizer, "PIECE_CHARACTERS", 40)
    patch.setattr(attnres.data.text.tokenizer, "LONGEST_PIECE", 2000)
    try:
        texts = [text[:30], text, text[5:]]
        whole = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
        assert [ids.tolist() for ids in encode(tokenizer, texts)] == whole
    finally:
        patch.undo()


def test_encode_cuts_a_run_without_words_and_loses_nothing(corpus, monkeypatch):
    monkeypatch.setattr(attnres.data.text.tokenizer, "PIECE_CHARACTERS", 40)
    monkeypatch.setattr(attnres.data.text.tokenizer, "LONGEST_PIECE", 80)
    text = "abcdé" * 100 + " a word" * 30
    (ids,) = encode(corpus.tokenizer, [text])
    assert corpus.tokenizer.decode(ids.tolist()) == text


def test_end_of_text_id_takes_no_name_that_no_token_can_have(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "\\ud800"}')
    with pytest.raises(DataError, match=r"no <\|endoftext\|> token, nor an eos_token in tokenizer_config.json"):
        end_of_text_id(regex_tokenizer(), tmp_path / "tokenizer.json")

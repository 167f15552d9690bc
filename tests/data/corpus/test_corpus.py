"""Building, splitting, caching and checking a corpus."""

import dataclasses
import json
import multiprocessing
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import attnres.data.preparation
from attnres.data import SPLITS, DataConfig, open_corpus, prepare
from attnres.data.corpus import builder, splits
from attnres.data.corpus.shards import token_dtype
from attnres.data.text.tokenizer import train_tokenizer
from attnres.errors import DataError, StorageError


def split_of(corpus, name):
    return next(s for s in SPLITS if corpus.names.index(name) in corpus.documents(s))


def test_prepare_keeps_every_text(corpus, texts):
    assert [corpus.text(document) for document in range(len(texts))] == texts
    assert corpus.names[3] == "documents.jsonl:4"


def test_prepare_splits_are_disjoint_and_fill_their_shards(corpus, texts):
    ids = np.concatenate([corpus.documents(split) for split in SPLITS])
    assert sorted(ids) == list(range(len(texts)))
    for split in SPLITS:
        documents = corpus.documents(split)
        tokens = corpus.tokens(split)
        ends = corpus.starts[documents] + corpus.lengths[documents]
        assert corpus.starts[documents].tolist() == [0, *ends[:-1]]
        assert ends[-1] == len(tokens)
        assert np.flatnonzero(tokens == corpus.eos_id).tolist() == (ends - 1).tolist()
        assert corpus.manifest["splits"][split] == {"documents": len(documents), "tokens": len(tokens)}
        assert tokens.max() < corpus.vocab_size <= 300


def test_prepare_splits_follow_the_fractions(make_config, random_text, tmp_path):
    config = make_config(tmp_path, [random_text(seed, 12) for seed in range(2000)], validation=0.1)
    corpus = prepare(config)
    expected = {"train": 0.62, "validation": 0.1, "probe_pilot": 0.08, "probe_confirm": 0.2}
    for split, fraction in expected.items():
        deviation = (fraction * (1 - fraction) / 2000) ** 0.5
        assert abs(len(corpus.documents(split)) / 2000 - fraction) < 5 * deviation


def test_prepare_moves_no_document_when_others_come(make_config, texts, corpus, tmp_path):
    larger = prepare(make_config(tmp_path, ["a document put first, of which there was no trace", *texts]))
    for document in range(len(texts)):
        assert split_of(corpus, f"documents.jsonl:{document + 1}") == split_of(
            larger, f"documents.jsonl:{document + 2}"
        )


def test_prepare_with_another_seed_splits_differently(config, corpus):
    other = prepare(dataclasses.replace(config, seed=1))
    assert other.documents("train").tolist() != corpus.documents("train").tolist()
    assert other.fingerprint != corpus.fingerprint


def test_prepare_keeps_near_duplicates_in_one_split(make_config, random_text, tmp_path):
    originals = [random_text(seed, 300) for seed in range(40)]
    edited = [text[:700] + " an inserted line " + text[700:] for text in originals]
    reindented = [text.replace(" ", "    ") for text in originals]
    corpus = prepare(make_config(tmp_path, originals + edited + originals + reindented))
    assert corpus.groups.tolist() == list(range(40)) * 4
    for split in SPLITS:
        # Either all four copies of a document are here, or none is.
        assert np.bincount(corpus.documents(split) % 40, minlength=40).tolist() == [
            4 if number in corpus.documents(split) else 0 for number in range(40)
        ]


def test_prepare_reads_the_end_of_text_token_in_a_text_as_text(make_config, texts, tmp_path):
    corpus = prepare(make_config(tmp_path, [f"a <|endoftext|> b {text}" for text in texts]))
    assert all((corpus.document_tokens(d) == corpus.eos_id).sum() == 1 for d in range(len(texts)))
    assert corpus.text(0) == f"a <|endoftext|> b {texts[0]}"


def test_prepare_trains_the_tokenizer_on_the_train_split_alone(config, corpus, texts, tmp_path, monkeypatch):
    seen = []

    def record(documents, vocab_size):
        seen.append(list(documents))
        return train_tokenizer(iter(seen[-1]), vocab_size)

    monkeypatch.setattr(builder, "train_tokenizer", record)
    prepare(dataclasses.replace(config, cache_dir=str(tmp_path / "all")))
    train = [texts[document] for document in corpus.documents("train")]
    assert seen == [train]
    monkeypatch.setattr(splits, "TOKENIZER_BYTES", sum(map(len, train)) // 2)
    prepare(dataclasses.replace(config, cache_dir=str(tmp_path / "half")))
    assert set(seen[1]) < set(train)
    assert 0.25 < len(seen[1]) / len(train) < 0.75


def test_prepare_twice_gives_the_same_tokenizer_and_fingerprint(config, corpus, tmp_path):
    again = prepare(dataclasses.replace(config, cache_dir=str(tmp_path)))
    assert again.path != corpus.path
    assert again.tokenizer_path.read_bytes() == corpus.tokenizer_path.read_bytes()
    assert (again.tokenizer_sha256, again.fingerprint) == (corpus.tokenizer_sha256, corpus.fingerprint)


def test_prepare_takes_an_existing_tokenizer(config, corpus, make_config, random_text, tmp_path):
    other_texts = [random_text(seed, 60) for seed in range(500, 620)]
    given_one = prepare(make_config(tmp_path, other_texts, tokenizer=str(corpus.path), vocab_size=4096))
    assert given_one.tokenizer_sha256 == corpus.tokenizer_sha256
    assert given_one.vocab_size == corpus.vocab_size
    with pytest.raises(DataError, match="data.tokenizer: .* does not exist"):
        prepare(dataclasses.replace(config, tokenizer=str(tmp_path / "nowhere.json")))


def test_prepare_reuses_what_it_built(config, corpus, monkeypatch):
    monkeypatch.setattr(attnres.data.preparation, "build", lambda *_: pytest.fail("built again"))
    windowed = dataclasses.replace(config, sequence_length=8, isolate_documents=True)
    assert prepare(windowed).path == corpus.path
    with pytest.raises(pytest.fail.Exception, match="built again"):
        prepare(dataclasses.replace(config, vocab_size=280))


def test_prepare_leaves_nothing_after_a_failure_and_recovers(make_config, texts, tmp_path, monkeypatch):
    config = make_config(tmp_path, texts)
    monkeypatch.setattr(builder, "digest", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare(config)
    assert [path for path in Path(config.cache_dir).iterdir() if path.is_dir()] == []
    monkeypatch.undo()
    # What a killed process leaves: a half-built folder, which the next one replaces.
    key = attnres.data.preparation._cache_key(config)
    leftover = Path(config.cache_dir, f"files-{key}.building")
    leftover.mkdir()
    (leftover / "train.tokens").write_bytes(b"half")
    assert prepare(config).manifest["documents"] == len(texts)
    assert not leftover.exists()


def test_prepare_from_two_processes_at_once_gives_one_good_corpus(make_config, texts, tmp_path):
    config = make_config(tmp_path, texts)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=prepare, args=(config,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len([path for path in Path(config.cache_dir).iterdir() if path.is_dir()]) == 1
    assert prepare(config).manifest["documents"] == len(texts)


def test_prepare_says_when_the_text_changes_while_it_is_read(make_config, texts, tmp_path, monkeypatch):
    config = make_config(tmp_path, texts)
    train_tokenizer = builder.train_tokenizer

    def edit_then_train(documents, vocab_size):
        make_config(tmp_path, [*texts[:-1], "another text"])
        return train_tokenizer(documents, vocab_size)

    monkeypatch.setattr(builder, "train_tokenizer", edit_then_train)
    with pytest.raises(DataError, match="documents.jsonl:120 changed while being read"):
        prepare(config)


def test_prepare_needs_a_document_and_a_window_in_each_split(make_config, texts, config, tmp_path):
    with pytest.raises(DataError, match="none of 2 documents .* fell into split"):
        prepare(make_config(tmp_path, texts[:2]))
    with pytest.raises(DataError, match="split .* fewer than one window of 100000"):
        prepare(dataclasses.replace(config, sequence_length=100_000))


def test_prepare_in_a_folder_that_cannot_be_written_is_a_storage_error(config, monkeypatch, tmp_path):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(attnres.data.preparation, "build", full)
    with pytest.raises(StorageError, match="No space left on device; free space"):
        prepare(dataclasses.replace(config, cache_dir=str(tmp_path)))


@pytest.fixture(scope="module")
def damaged(corpus, tmp_path_factory):
    """A copy of the corpus to damage and repair."""
    copy = tmp_path_factory.mktemp("damaged") / "corpus"
    shutil.copytree(corpus.path, copy)
    return copy


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_open_corpus_finds_any_flipped_bit_and_any_truncation(damaged, data):
    path = damaged / data.draw(st.sampled_from(sorted(p.name for p in damaged.iterdir())))
    good = path.read_bytes()
    at = data.draw(st.integers(0, len(good) - 1))
    flipped = bytes([good[at] ^ 1 << data.draw(st.integers(0, 7))])
    try:
        for bad in (good[:at] + flipped + good[at + 1 :], good[:at]):
            path.write_bytes(bad)
            with pytest.raises(DataError, match=path.name) as error:
                open_corpus(damaged)
            assert f"delete {damaged}" in str(error.value)
    finally:
        path.write_bytes(good)
    assert open_corpus(damaged).vocab_size <= 300


def test_open_corpus_says_where_a_shard_is_damaged(damaged):
    path = damaged / "train.tokens"
    good = path.read_bytes()
    try:
        path.write_bytes(good[:100] + bytes([good[100] ^ 1]) + good[101:])
        with pytest.raises(DataError, match=f"train.tokens is damaged between bytes 0 and {len(good)};"):
            open_corpus(damaged)
        path.write_bytes(good[:100])
        with pytest.raises(DataError, match=f"train.tokens ends at byte 100, expected {len(good)};"):
            open_corpus(damaged)
        path.unlink()
        with pytest.raises(DataError, match="train.tokens is missing"):
            open_corpus(damaged)
    finally:
        path.write_bytes(good)


def test_manifest_tells_versions_and_digests(corpus):
    manifest = json.loads((corpus.path / "manifest.json").read_text())
    assert manifest["files"]["tokenizer.json"]["sha256"] == corpus.tokenizer_sha256
    assert set(manifest["files"]) == {p.name for p in corpus.path.iterdir()} - {"manifest.json"}
    assert set(manifest["versions"]) == {"python", "tokenizers"}


@pytest.mark.parametrize(("vocab_size", "itemsize"), [(300, 2), (65_535, 2), (65_536, 4)])
def test_token_dtype_is_as_small_as_the_vocabulary_allows(vocab_size, itemsize):
    assert token_dtype(vocab_size).itemsize == itemsize


def test_prepare_reads_the_standard_library(tmp_path):
    fractions = {"validation": 0.15, "probe_pilot": 0.15}
    corpus = prepare(DataConfig(max_bytes=800_000, vocab_size=400, cache_dir=str(tmp_path), **fractions))
    assert corpus.names[:2] == ["__future__.py", "__hello__.py"]
    assert "import argparse" in corpus.text(corpus.names.index("ast.py"))

"""What is in a training window and in a probe window."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attnres.data import NO_TARGET, SPLITS, WindowDataset, prepare, probe_windows
from attnres.errors import ConfigError, DataError


@pytest.mark.parametrize("split", SPLITS)
def test_window_dataset_is_the_split_cut_into_windows(corpus, split):
    windows = WindowDataset(corpus, split, 16)
    inputs = torch.cat([windows[i]["input_ids"] for i in range(len(windows))])
    labels = torch.cat([windows[i]["labels"] for i in range(len(windows))])
    tokens = torch.from_numpy(corpus.tokens(split).astype(np.int64))
    assert torch.equal(inputs, tokens[: len(inputs)])
    assert torch.equal(labels, tokens[1 : len(labels) + 1])
    assert 0 <= len(tokens) - 1 - len(inputs) < 16
    assert "position_ids" not in windows[0]
    with pytest.raises(IndexError):
        windows[len(windows)]


@pytest.mark.parametrize("length", [1, 7, 16, 400])
def test_window_dataset_isolated_restarts_positions_and_drops_foreign_targets(corpus, length):
    plain = WindowDataset(corpus, "validation", length)
    isolated = WindowDataset(corpus, "validation", length, isolate_documents=True)
    documents = corpus.documents("validation")
    owner = np.repeat(documents, corpus.lengths[documents]).tolist()
    dropped = 0
    for index in range(len(isolated)):
        item, labels = isolated[index], plain[index]["labels"].tolist()
        positions = [0]
        # Token by token, from who owns each token.
        for t in range(length):
            at = index * length + t
            if t:
                positions.append(positions[-1] + 1 if owner[at] == owner[at - 1] else 0)
            if owner[at + 1] != owner[at]:
                labels[t] = NO_TARGET
                dropped += 1
        assert item["position_ids"].tolist() == positions
        assert item["labels"].tolist() == labels
        assert torch.equal(item["input_ids"], plain[index]["input_ids"])
    assert dropped >= len(set(owner)) - 2


@pytest.mark.parametrize("length", [1, 16, 400])
def test_window_dataset_documents_are_the_owners_of_its_tokens(corpus, length):
    windows = WindowDataset(corpus, "validation", length)
    documents = corpus.documents("validation")
    owner = np.repeat(documents, corpus.lengths[documents])
    for index in range(len(windows)):
        assert windows.documents(index).tolist() == np.unique(owner[index * length :][: length + 1]).tolist()


def test_window_dataset_pickles_as_its_arguments_not_its_tokens(corpus):
    windows = WindowDataset(corpus, "train", 16)
    pickled = pickle.dumps(windows)
    assert len(pickled) < corpus.tokens("train").nbytes / 4
    assert torch.equal(pickle.loads(pickled)[5]["labels"], windows[5]["labels"])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(length=st.integers(1, 200), per_document=st.integers(1, 4), seed=st.integers(0, 99))
def test_probe_windows_lie_within_their_document_and_apart(corpus, length, per_document, seed):
    windows = probe_windows(corpus, "probe_confirm", length, windows_per_document=per_document, seed=seed)
    tokens = corpus.tokens("probe_confirm")
    documents = corpus.documents("probe_confirm")
    capacity = np.minimum(per_document, (corpus.lengths[documents] - 1) // length)
    assert len(windows) == capacity.sum()
    assert windows.input_ids.shape == windows.labels.shape == (len(windows), length)
    used = np.zeros(len(tokens), int)
    for row in range(len(windows)):
        start, document = int(windows.window_ids[row]), int(windows.document_ids[row])
        offset = start - corpus.starts[document]
        assert offset >= 0 and offset + length + 1 <= corpus.lengths[document]
        assert windows.input_ids[row].tolist() == tokens[start : start + length].tolist()
        assert windows.labels[row].tolist() == tokens[start + 1 : start + length + 1].tolist()
        assert corpus.eos_id not in windows.input_ids[row]
        used[start : start + length] += 1
    assert used.max() == 1


def test_probe_windows_caps_keep_the_beginning(corpus):
    whole = probe_windows(corpus, "probe_confirm", 20, windows_per_document=2, seed=4)
    few = probe_windows(corpus, "probe_confirm", 20, windows_per_document=2, max_documents=5, seed=4)
    assert len(set(few.document_ids.tolist())) == 5
    assert whole.window_ids[: len(few)].tolist() == few.window_ids.tolist()
    assert torch.equal(whole.input_ids[: len(few)], few.input_ids)


def test_probe_windows_depend_on_the_seed_alone(corpus):
    first, again, other = (probe_windows(corpus, "probe_confirm", 20, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.window_ids, again.window_ids)
    assert first.document_ids.tolist() != other.document_ids.tolist()
    assert sorted(first.window_ids.tolist()) != sorted(other.window_ids.tolist())
    # A document keeps its place in the order whatever the length that is asked for.
    longer = probe_windows(corpus, "probe_confirm", 300, seed=0).document_ids.tolist()
    assert 0 < len(longer) < len(first)
    assert [d for d in first.document_ids.tolist() if d in longer] == longer


def test_probe_windows_take_one_document_of_a_group(make_config, random_text, tmp_path):
    texts = [random_text(seed, 200) for seed in range(60)]
    corpus = prepare(make_config(tmp_path, [*texts, *(text + " the end" for text in texts)]))
    windows = probe_windows(corpus, "probe_confirm", 16)
    assert len(windows) == len(corpus.documents("probe_confirm")) / 2
    assert len(set((windows.document_ids % 60).tolist())) == len(windows)


def test_probe_windows_says_how_long_the_documents_are(corpus):
    longest = corpus.lengths[corpus.documents("probe_pilot")].max()
    message = f"has the {longest + 1} tokens .*the longest has {longest};"
    with pytest.raises(DataError, match=message) as error:
        probe_windows(corpus, "probe_pilot", int(longest))
    assert error.value.code == 3
    assert len(probe_windows(corpus, "probe_pilot", int(longest) - 1)) == 1
    with pytest.raises(ConfigError, match="windows_per_document: expected at least 1, got 0"):
        probe_windows(corpus, "probe_pilot", 8, windows_per_document=0)
    with pytest.raises(ConfigError, match="split: expected one of train, .* got 'test'"):
        probe_windows(corpus, "test", 8)

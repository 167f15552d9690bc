"""Several corpora as one: what belongs to which set, and the order in which their windows are drawn."""

import dataclasses
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnres.data import SPLITS, DataConfig, TextDataModule, WindowDataset, documents_in_step, prepare
from attnres.data.windows.mixing import ROUND, Mix, Mixture, quotas
from attnres.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def members(make_config, corpus, random_text, tmp_path_factory):
    """Two more corpora with the tokenizer of `corpus`, one of them with fewer documents."""
    made = []
    for first, count in ((1000, 60), (2000, 90)):
        folder = tmp_path_factory.mktemp("member")
        texts = [random_text(seed, 50) for seed in range(first, first + count)]
        made.append(prepare(make_config(folder, texts, tokenizer=str(corpus.path), probe_confirm=0.3)))
    return [corpus, *made]


@pytest.fixture(scope="module")
def mixed_config(members):
    return DataConfig(
        source="prepared", paths=tuple(str(member.path) for member in members), weights=(6, 1, 3), sequence_length=16
    )


@pytest.fixture(scope="module")
def mixed(mixed_config):
    return prepare(mixed_config)


MIXES = st.lists(st.tuples(st.integers(20, 900), st.floats(0.05, 1)), min_size=2, max_size=4).map(
    lambda sets: Mix(
        tuple(int(n) for n in np.cumsum([0, *(count for count, _ in sets[:-1])])),
        tuple(count for count, _ in sets),
        quotas([weight for _, weight in sets]),
    )
)


@settings(deadline=None, max_examples=40)
@given(mix=MIXES, seed=st.integers(0, 2**32), start=st.integers(0, 3 * ROUND), length=st.integers(0, 60))
def test_mix_ids_at_a_position_depend_on_seed_and_position_alone(mix, seed, start, length):
    whole = mix.ids(range(max(0, start - 7), start + length + 5), seed)
    assert whole[min(start, 7) :][:length].tolist() == mix.ids(range(start, start + length), seed).tolist()


@settings(deadline=None, max_examples=15)
@given(mix=MIXES, seed=st.integers(0, 2**32))
def test_mix_ids_draw_by_weight_and_visit_each_window_once_per_epoch_of_its_set(mix, seed):
    ids = mix.ids(range(2 * ROUND), seed)
    for first, count, quota in zip(mix.first, mix.count, mix.quota, strict=True):
        mine = ids[(ids >= first) & (ids < first + count)] - first
        assert len(mine) == 2 * quota
        for epoch in range(len(mine) // count):
            assert sorted(mine[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_mix_ids_are_pinned_and_are_not_in_blocks():
    mix = Mix((0, 30), (30, 20), quotas([0.75, 0.25]))
    # A resumed run must see this order on any machine and with any later numpy.
    assert mix.ids(range(4094, 4102), 3).tolist() == [44, 49, 12, 0, 43, 20, 46, 34]
    owner = mix.ids(range(400), 0) >= 30
    assert 60 < owner.sum() < 140 and np.abs(np.diff(owner.astype(int))).sum() > 30


def test_quotas_follow_the_weights_and_refuse_what_is_never_drawn():
    assert quotas([3, 1]) == (3072, 1024)
    assert sum(quotas([1, 1, 1])) == ROUND and max(quotas([1, 1, 1])) - min(quotas([1, 1, 1])) == 1
    with pytest.raises(ConfigError, match=r"data.weights\[1\]: expected at least 1/4096"):
        quotas([1, 1e-5])


def test_mixture_holds_the_documents_and_ids_of_its_parts_in_order(mixed, members):
    assert mixed.names == [name for member in members for name in member.names]
    assert mixed.names_of([130, 3, 200]) == [members[1].names[10], members[0].names[3], members[2].names[20]]
    assert [mixed.text(d) for d in (5, 125, 185)] == [members[0].text(5), members[1].text(5), members[2].text(5)]
    for split in SPLITS:
        ids, tokens = np.concatenate([member.tokens(split)[:] for member in members]), mixed.tokens(split)
        assert np.array_equal(tokens[:], ids)
        # Reads that cross from one member's shard into the next.
        for start in range(0, len(ids), 61):
            assert np.array_equal(tokens[start : start + 90], ids[start : start + 90])
        places = np.arange(len(ids)).reshape(1, -1)[:, ::-3]
        assert np.array_equal(tokens[places], ids[places])
    assert np.array_equal(mixed.groups[120:180], members[1].groups + 120)
    assert mixed.fingerprint not in [member.fingerprint for member in members]


def test_mixture_gives_each_window_to_the_set_of_its_first_token(mixed, members):
    mix, windows = mixed.mix("train", 16), WindowDataset(mixed, "train", 16)
    assert sum(mix.count) == len(windows)
    edges = np.cumsum([len(member.lengths) for member in members])
    for index, (first, count) in enumerate(zip(mix.first, mix.count, strict=True)):
        owners = [np.searchsorted(edges, windows.documents(i)[0], side="right") for i in range(first, first + count)]
        assert set(owners) == {index}


def test_datamodule_of_a_mixture_trains_by_weight_and_validates_alike(mixed, mixed_config):
    data = TextDataModule(mixed, mixed_config, 5, 10, steps=range(30))
    ids = np.concatenate([batch["sample_ids"].numpy() for batch in data.train_dataloader()])
    mix = mixed.mix("train", 16)
    assert ids.tolist() == mix.ids(range(300), 0).tolist()
    assert np.histogram(ids, [*mix.first, sum(mix.count)])[0] / 300 == pytest.approx([0.6, 0.1, 0.3], abs=0.08)
    later = TextDataModule(pickle.loads(pickle.dumps(mixed)), mixed_config, 5, 10, steps=range(7, 8))
    assert next(iter(later.train_dataloader()))["sample_ids"].tolist() == ids[70:75].tolist()
    assert list(documents_in_step(mixed, mixed_config, 7, 10)) == ids[70:80].tolist()
    validated = [i for batch in data.val_dataloader() for i in batch["sample_ids"].tolist()]
    assert validated == mixed.mix("validation", 16).in_order().tolist()
    assert len(set(validated)) == len(validated)


def test_mix_in_order_ends_where_a_set_is_exhausted():
    mix = Mix((0, 4), (4, 1000), quotas([1, 1]))
    ids = mix.in_order().tolist()
    assert [i for i in ids if i < 4] == [0, 1, 2, 3]
    assert [i for i in ids if i >= 4] == list(range(4, len(ids)))


def test_datamodule_refuses_a_set_that_would_repeat_within_a_batch(mixed, mixed_config):
    count = mixed.mix("train", 16).count[1]
    heavy = dataclasses.replace(mixed_config, weights=(1, 500, 1))
    with pytest.raises(DataError, match=rf"data.paths\[1\] has {count} training windows, and a global batch of 900"):
        TextDataModule(prepare(heavy), heavy, 1, 900)


def test_mixture_refuses_other_tokenizers_and_leaks(members, make_config, random_text, texts, tmp_path):
    other = prepare(make_config(tmp_path, [random_text(seed, 60) for seed in range(3000, 3100)]))
    paths = (str(members[0].path), str(other.path))
    with pytest.raises(DataError, match=f"data.paths: {other.path} has tokenizer .* prepare them with the same one"):
        prepare(DataConfig(source="prepared", paths=paths, weights=(1, 1), sequence_length=16))
    with pytest.raises(DataError, match=f"{members[0].path} was made with .*leave data.tokenizer out"):
        given = str(other.tokenizer_path)
        prepare(DataConfig(source="prepared", paths=paths[:1], tokenizer=given, sequence_length=16))
    # The same texts split by another seed: most held-out ones are trained on in the other corpus.
    again = prepare(make_config(tmp_path, texts, seed=1, tokenizer=str(members[0].path)))
    paths = (str(members[0].path), str(again.path))
    with pytest.raises(DataError, match="data leak between data.paths: .* prepare one with --exclude") as error:
        prepare(DataConfig(source="prepared", paths=paths, weights=(1, 1), sequence_length=16))
    assert error.value.code == 3


def test_prepare_opens_a_folder_and_names_the_command_that_makes_it(corpus, tmp_path):
    config = DataConfig(source="prepared", paths=(str(corpus.path),), sequence_length=16, obtain="make it so")
    opened = prepare(config)
    assert opened.fingerprint == corpus.fingerprint and not isinstance(opened, Mixture)
    with pytest.raises(DataError, match="nowhere holds no prepared token shards; make it with: make it so"):
        prepare(dataclasses.replace(config, paths=(str(tmp_path / "nowhere"),)))

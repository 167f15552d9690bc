"""The command that streams text into token shards: one result, however many work on it and however often they die."""

import dataclasses
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

import attnres.data.text.tokenizer
from attnres.data import SPLITS, DataConfig, TextDataModule, open_corpus, prepare
from attnres.data.corpus import chunks, make_shards, scatter
from attnres.data.corpus.duplicates import group_near_duplicates, minhash_signature
from attnres.data.corpus.grouping import Signatures, group_on_disk
from attnres.data.text import streams
from attnres.data.text.streams import FileStream, HubStream
from attnres.data.text.tokenizer import encode
from attnres.errors import ConfigError, DataError, Stopped

SETTINGS = make_shards.Settings(
    validation=0.15, probe_pilot=0.08, probe_confirm=0.2, shard_tokens=4000, max_document_bytes=100_000
)


@pytest.fixture(scope="module")
def documents(texts, random_text) -> list[str]:
    """Texts with near-duplicates of some, far from them, and blank ones between."""
    extra = [random_text(seed, 300) for seed in range(500, 512)]
    return [*extra, *texts[:60], " \n", *texts[60:], "", *(text + " and an end" for text in extra)]


@pytest.fixture(scope="module")
def source(documents, tmp_path_factory) -> Path:
    """The texts in three files."""
    folder = tmp_path_factory.mktemp("source")
    for number, part in enumerate((documents[:50], documents[50:51], documents[51:])):
        lines = (json.dumps({"text": text}) + "\n" for text in part)
        (folder / f"{number}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="module", autouse=True)
def small():
    """Many chunks and synced places of few documents."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "CHUNK_DOCUMENTS", 16)
        patch.setattr(chunks, "CHUNK_BYTES", 6000)
        patch.setattr(scatter, "SYNC_CHUNKS", 3)
        yield


@pytest.fixture(scope="module")
def make(source, corpus):
    def make(out: Path, **changes):
        arguments = {"stream": FileStream((str(source),)), "settings": SETTINGS, "tokenizer": str(corpus.path)}
        return make_shards.make_shards(out, **(arguments | changes))

    return make


@pytest.fixture(scope="module")
def shards(make, tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("shards") / "out")


def contents(folder: Path) -> dict[str, str]:
    files = json.loads((folder / "manifest.json").read_text())["files"]
    return {name: entry["sha256"] for name, entry in files.items()}


def test_make_shards_gives_what_the_pipeline_in_memory_gives(shards, source, corpus, documents, tmp_path):
    fractions = {name: getattr(SETTINGS, name) for name in SPLITS[1:]}
    in_memory = prepare(
        DataConfig(source="files", paths=(str(source),), tokenizer=str(corpus.path), sequence_length=16,
                   cache_dir=str(tmp_path), **fractions)
    )  # fmt: skip
    made = open_corpus(shards)
    assert made.names == in_memory.names
    assert made.groups.tolist() == in_memory.groups.tolist()
    assert made.split_indices.tolist() == in_memory.split_indices.tolist()
    for split in SPLITS:
        assert made.tokens(split)[:].tolist() == in_memory.tokens(split).tolist()
    assert np.array_equal(made.content, in_memory.content)
    assert [made.text(i) for i in range(len(made.lengths))] == [text for text in documents if text.strip()]
    sizes = [path.stat().st_size // 2 for path in made.shards("train")]
    assert len(sizes) > 2 and sizes[:-1] == [4000] * (len(sizes) - 1)
    assert made.manifest["near_duplicate_groups"] == len(made.lengths) - 12
    assert made.manifest["left_out"] == {"blank": 2, "excluded": 0, "too_long": 0, "too_long_names": []}
    assert made.manifest["throughput"]["tokens_per_second_per_core"] > 0


@pytest.mark.parametrize("workers", [2, 3])
def test_make_shards_does_not_depend_on_the_number_of_processes(make, shards, tmp_path, workers):
    made = make(tmp_path / "out", workers=workers)
    assert contents(made) == contents(shards)
    assert open_corpus(made).fingerprint == open_corpus(shards).fingerprint
    assert sorted(path.name for path in made.iterdir()) == sorted([*contents(shards), "manifest.json"])


def test_make_shards_killed_at_random_moments_loses_and_repeats_nothing(make, shards, tmp_path, monkeypatch):
    write_chunk, sync = chunks.write_chunk, scatter.RollingShards.sync

    def slowly(*arguments):
        time.sleep(0.02)
        return write_chunk(*arguments)

    def sync_slowly(self):
        time.sleep(0.02)
        return sync(self)

    monkeypatch.setattr(make_shards, "write_chunk", slowly)
    monkeypatch.setattr(scatter.RollingShards, "sync", sync_slowly)

    def attempt():
        os.setsid()
        make(tmp_path / "out", workers=2)

    context, rng, kills = multiprocessing.get_context("fork"), random.Random(1), 0
    for _ in range(40):
        process = context.Process(target=attempt)
        process.start()
        process.join(rng.uniform(0.05, 0.6))
        if process.exitcode is not None:
            assert process.exitcode == 0
            break
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
        kills += 1
    assert kills >= 3
    make(tmp_path / "out")
    assert contents(tmp_path / "out") == contents(shards)


class Killed(BaseException):
    """Ends the work as suddenly as a signal."""


@pytest.mark.parametrize(
    ("where", "call"),
    [("group_on_disk", 1), ("write_documents", 1), ("scatter", 1), ("_fingerprint", 1), ("write_atomically", 2)],
)
def test_make_shards_goes_on_from_every_stage(make, shards, tmp_path, monkeypatch, where, call):
    calls, real = [], getattr(make_shards, where)

    def killed_after(*arguments):
        result = real(*arguments)
        calls.append(1)
        if len(calls) == call:
            raise Killed
        return result

    monkeypatch.setattr(make_shards, where, killed_after)
    with pytest.raises(Killed):
        make(tmp_path / "out")
    monkeypatch.undo()
    assert contents(make(tmp_path / "out")) == contents(shards)


def test_make_shards_goes_on_at_a_gap_left_by_a_slower_process(make, shards, tmp_path, monkeypatch):
    monkeypatch.setattr(make_shards, "group_on_disk", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make(tmp_path / "out")
    monkeypatch.undo()
    folder = tmp_path / "out.building"
    assert len(list((folder / "chunks").iterdir())) > 4
    (folder / "stream.json").unlink()
    shutil.rmtree(folder / "chunks" / "00000002")
    shutil.copytree(folder / "chunks" / "00000003", folder / "chunks" / ".00000002.1")
    assert contents(make(tmp_path / "out", workers=2)) == contents(shards)


@pytest.mark.parametrize("sync", range(1, 5))
def test_scatter_goes_on_from_its_last_synced_place(make, shards, source, tmp_path, monkeypatch, sync):
    calls, write = [], scatter.write_atomically

    def killed(*arguments):
        calls.append(1)
        if len(calls) == sync:
            raise Killed
        write(*arguments)

    monkeypatch.setattr(scatter, "write_atomically", killed)
    with pytest.raises(Killed):
        make(tmp_path / "out")
    left = len(list((tmp_path / "out.building" / "chunks").iterdir()))
    monkeypatch.setattr(scatter, "write_atomically", write)
    assert contents(make(tmp_path / "out")) == contents(shards)
    # What was synced had been deleted: the ids are on disk once.
    assert left == len(list(chunks.read_chunks(FileStream((str(source),)), None, 0, 100_000))) - 3 * (sync - 1)


def test_make_shards_says_when_a_worker_is_gone_and_goes_on(make, shards, tmp_path, monkeypatch):
    monkeypatch.setattr(make_shards, "write_chunk", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(Stopped, match="a worker was killed .* the same command goes on"):
        make(tmp_path / "out")
    monkeypatch.setattr(make_shards, "write_chunk", chunks.write_chunk)
    assert contents(make(tmp_path / "out")) == contents(shards)


def test_make_shards_finds_a_damaged_chunk(make, tmp_path, monkeypatch):
    monkeypatch.setattr(make_shards, "scatter", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make(tmp_path / "out")
    monkeypatch.setattr(make_shards, "scatter", scatter.scatter)
    path = tmp_path / "out.building" / "chunks" / "00000003" / "tokens"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with pytest.raises(DataError, match=f"{path} is damaged; delete {tmp_path / 'out.building'}"):
        make(tmp_path / "out")


def test_make_shards_leaves_out_by_name_what_is_too_long_and_what_is_excluded(make, shards, documents, tmp_path):
    longest = max(len(text.encode()) for text in documents)
    made = open_corpus(make(tmp_path / "short", settings=dataclasses.replace(SETTINGS, max_document_bytes=longest - 1)))
    assert made.manifest["left_out"]["too_long"] == 1
    ((name, size),) = made.manifest["left_out"]["too_long_names"]
    assert size == longest and name not in made.names and len(made.names) == len(open_corpus(shards).names) - 1

    lines = [json.dumps({"text": text}) + "\n" for text in documents]
    (tmp_path / "more.jsonl").write_text("".join(lines[:40]) + "".join(lines[:40]).replace("a", "x").replace("b", "yy"))
    more = FileStream((str(tmp_path / "more.jsonl"),))
    rest = open_corpus(make(tmp_path / "rest", stream=more, exclude=[shards]))
    assert rest.names == [f"more.jsonl:{number}" for number in range(41, 81)]
    assert rest.manifest["left_out"]["excluded"] == 40
    assert rest.groups.min() == 0 and rest.groups.max() < 40
    mixed = {"source": "prepared", "paths": (str(shards), str(rest.path)), "weights": (1.0, 1.0)}
    assert len(prepare(DataConfig(sequence_length=16, **mixed)).names) == len(rest.names) + len(
        open_corpus(shards).names
    )


def test_make_shards_stops_before_max_bytes_also_when_resumed(make, documents, tmp_path, monkeypatch):
    limit = dataclasses.replace(SETTINGS, max_bytes=sum(len(text.encode()) for text in documents[:90]) + 3)
    whole = make(tmp_path / "whole", settings=limit)
    assert len(open_corpus(whole).names) == len([text for text in documents[:90] if text.strip()])
    calls = []

    def killed(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise Killed
        return None

    monkeypatch.setattr(make_shards._Total, "add", lambda self, metas: (list(metas), killed()))
    with pytest.raises(Killed):
        make(tmp_path / "out", settings=limit)
    monkeypatch.undo()
    assert contents(make(tmp_path / "out", settings=limit))["tokenizer.json"] == contents(whole)["tokenizer.json"]
    assert open_corpus(tmp_path / "out").names == open_corpus(whole).names


def test_make_shards_trains_a_tokenizer_on_the_train_split(make, documents, tmp_path, monkeypatch):
    seen = []
    real = make_shards.train_tokenizer

    def record(texts, size):
        seen.extend(texts)
        return real(iter(seen), size)

    monkeypatch.setattr(make_shards, "train_tokenizer", record)
    made = open_corpus(make(tmp_path / "out", tokenizer=None, vocab_size=300))
    alone = np.bincount(made.groups, minlength=len(made.groups))[made.groups] == 1
    held_out = {made.text(i) for i in np.flatnonzero((made.split_indices > 0) & alone)}
    assert made.vocab_size == 300 and held_out and not held_out & set(seen)


def test_make_shards_refuses_what_is_in_the_way(make, shards, source, tmp_path, monkeypatch):
    assert make(shards) == shards  # complete: nothing to do
    with pytest.raises(ConfigError, match="was made with other settings"):
        make(shards, settings=dataclasses.replace(SETTINGS, seed=3))
    (tmp_path / "there").mkdir()
    with pytest.raises(ConfigError, match="exists and is not a folder of token shards"):
        make(tmp_path / "there")
    monkeypatch.setattr(make_shards, "scatter", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make(tmp_path / "out")
    with pytest.raises(ConfigError, match="unfinished work that differs in settings; delete it"):
        make(tmp_path / "out", settings=dataclasses.replace(SETTINGS, seed=3))
    with pytest.raises(ConfigError, match="either --tokenizer or --vocab-size"):
        make(tmp_path / "other", vocab_size=300)
    with pytest.raises(DataError, match="fell into split validation; give more text, raise --validation"):
        make(tmp_path / "few", stream=FileStream((str(source / "1.jsonl"),)), settings=make_shards.Settings())


def test_make_shards_command_ends_with_a_path_or_one_line_and_its_code(shards, source, corpus, tmp_path, capfd):
    words = f"--paths {source} --tokenizer {corpus.path} --validation 0.15 --probe-pilot 0.08 --probe-confirm 0.2 "
    words += f"--workers 1 --shard-tokens 4000 --max-document-bytes 100000 --out {tmp_path / 'out'}"
    assert make_shards.main(words.split()) == 0
    assert capfd.readouterr().out.strip() == str(tmp_path / "out")
    assert contents(tmp_path / "out") == contents(shards)
    command = open_corpus(tmp_path / "out").manifest["command"]
    assert command == "python -m attnres.commands.make_shards " + words
    for change, code in (("--seed 5", 2), ("--workers 0", 2), ("--validation 1.5", 2)):
        assert make_shards.main(f"{words} {change}".split()) == code
    assert make_shards.main(["--out", str(tmp_path / "x"), "--paths", "nowhere", "--tokenizer", str(corpus.path)]) == 3
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 4 and "nowhere does not exist" in errors[-1]
    # Damage found later names the command that makes the folder again.
    path = tmp_path / "out" / "train-00001.tokens"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(DataError, match="train-00001.tokens ends at byte .* make it again with: python -m attnres"):
        prepare(DataConfig(source="prepared", paths=(str(tmp_path / "out"),), sequence_length=16))


def test_training_from_shards_reads_across_them(shards, corpus):
    config = DataConfig(source="prepared", paths=(str(shards),), sequence_length=900, isolate_documents=True)
    made = prepare(config)
    tokens = np.concatenate([np.fromfile(path, made.manifest["dtype"]) for path in made.shards("train")])
    data = TextDataModule(made, config, 2, 4, max_steps=3)
    for batch in data.train_dataloader():
        for ids, window in zip(batch["input_ids"].tolist(), batch["sample_ids"].tolist(), strict=True):
            assert ids == tokens[window * 900 :][:900].tolist()


def write_files(folder: Path, documents: list[str]) -> tuple[str, ...]:
    folder.mkdir()
    for number, text in enumerate(documents[:4]):
        (folder / f"{number}.txt").write_bytes(text.encode())
    pq.write_table(pa.table({"text": documents[4:40]}), folder / "5.parquet", row_group_size=7)
    (folder / "6.jsonl").write_text("\n\n".join(json.dumps({"text": text}) for text in documents[40:]))
    return (str(folder),)


def test_file_stream_goes_on_behind_any_document(documents, tmp_path):
    stream = FileStream(write_files(tmp_path / "files", documents))
    whole = [(document, json.loads(json.dumps(state))) for document, state in stream.read(None)]
    assert [document.text for document, _ in whole] == documents
    for at in range(len(whole)):
        assert list(stream.read(whole[at][1])) == whole[at + 1 :]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_hub_stream_goes_on_behind_any_document(documents, tmp_path, monkeypatch, suffix):
    """The library's own streaming, on a file in place of the hub."""
    table = pa.table({"id": [f"urn:{number}" for number in range(len(documents))], "text": documents})
    if suffix == "parquet":
        pq.write_table(table, tmp_path / "rows.parquet", row_group_size=9)
    else:
        lines = (json.dumps(row) + "\n" for row in table.to_pylist())
        (tmp_path / "rows.jsonl").write_text("".join(lines))

    def load(name, config, split, revision):
        assert (name, config, split, revision) == ("some/set", "part", "train", "abc")
        kind = {"jsonl": "json"}.get(suffix, suffix)
        files = str(tmp_path / f"rows.{suffix}")
        return datasets.load_dataset(kind, data_files=files, split=split, streaming=True, cache_dir=str(tmp_path))

    monkeypatch.setattr(streams, "load_hub", load)
    stream = HubStream("some/set", "part", "train", "abc")
    whole = [(document, json.loads(json.dumps(state))) for document, state in stream.read(None)]
    assert [document.text for document, _ in whole] == documents
    assert whole[3][0].name == "urn:3"
    for at in range(0, len(whole), 7):
        rest = list(stream.read(whole[at][1]))
        assert [document for document, _ in rest] == [document for document, _ in whole[at + 1 :]]
        again = stream.read(json.loads(json.dumps(rest[10][1]))) if len(rest) > 10 else ()
        assert [document for document, _ in again] == [document for document, _ in rest[11:]]
    with pytest.raises(DataError, match="some/set: no column 'body' in .*set --text-column"):
        next(iter(dataclasses.replace(stream, column="body").read(None)))


def test_make_shards_from_a_hub_pins_the_revision_that_it_began_with(
    shards, documents, corpus, tmp_path, monkeypatch, capfd
):
    pq.write_table(pa.table({"text": documents}), tmp_path / "rows.parquet")
    commits, loaded = ["first", "second"], []

    def load(name, config, split, revision):
        loaded.append((name, config, revision))
        files = str(tmp_path / "rows.parquet")
        return datasets.load_dataset("parquet", data_files=files, split=split, streaming=True, cache_dir=str(tmp_path))

    monkeypatch.setattr(streams, "load_hub", load)
    monkeypatch.setattr(make_shards, "resolve_revision", lambda name, revision: commits.pop(0))
    monkeypatch.setattr(make_shards, "group_on_disk", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    words = f"--tokenizer {corpus.path} --validation 0.15 --probe-pilot 0.08 --probe-confirm 0.2 --workers 1"
    words = [*words.split(), "--shard-tokens", "4000", "--out", str(tmp_path / "out")]
    assert make_shards.main(words) == 75
    assert "stopped by a signal; the same command goes on" in capfd.readouterr().err
    monkeypatch.setattr(make_shards, "group_on_disk", group_on_disk)
    assert make_shards.main(words) == 0
    assert set(loaded) == {("HuggingFaceFW/fineweb-edu", "sample-10BT", "first")}
    made, other = open_corpus(tmp_path / "out"), open_corpus(shards)
    assert made.manifest["source"]["revision"] == "first"
    assert made.fingerprint == other.fingerprint
    assert made.names[0] == "HuggingFaceFW/fineweb-edu:1"


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


@pytest.mark.parametrize("portion", [1_000_000, 200, 37])
def test_group_on_disk_groups_as_in_memory_whatever_fits(corpus, random_text, tmp_path, portion):
    originals = [random_text(seed, 100) for seed in range(60)]
    texts = [*originals, *(text + " more" for text in originals[:25]), *originals[10:20], "short", "short", "other"]
    documents = [streams.Document(str(number), text) for number, text in enumerate(texts)]
    counts = []
    for number, start in enumerate(range(0, len(documents), 20)):
        part = documents[start : start + 20]
        chunk = chunks.Chunk(number, part, None, [], 0, 0.0)
        chunks.write_chunk(tmp_path, chunk, corpus.tokenizer, corpus.eos_id, np.dtype("<u2"))
        counts.append(len(part))
    expected = group_near_duplicates(np.stack([minhash_signature(text) for text in texts]))
    assert group_on_disk(Signatures(tmp_path, counts), portion).tolist() == expected.tolist()
    assert len(np.unique(expected)) == 62

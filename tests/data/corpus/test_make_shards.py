"""The command that streams text into token shards: one result, however many work on it and however often they die."""

import dataclasses
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from attnres.commands import make_shards as command
from attnres.data import SPLITS, DataConfig, TextDataModule, open_corpus, prepare
from attnres.data.corpus import builder, chunks, make_shards, scatter, workers
from attnres.data.text import streams
from attnres.data.text.streams import FileStream
from attnres.errors import ConfigError, DataError, Stopped
from attnres.files.whole_files import MOST_DEPTH

CONFIG = make_shards.ShardsConfig(
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
    def make(out: Path, workers: int = 1, **changes):
        job = {"stream": stream_of(source), "config": CONFIG, "tokenizer": str(corpus.path)}
        return make_shards.make_shards(out, make_shards.Job(**(job | changes)), workers)

    return make


@pytest.fixture(scope="module")
def shards(make, tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("shards") / "out")


def stream_of(*paths: Path) -> FileStream:
    return FileStream(DataConfig(source="files", paths=tuple(map(str, paths))))


def words_of(corpus, out: Path, more: str) -> str:
    """The command's words for the fractions of `CONFIG` and the tokenizer of a corpus."""
    fractions = "--validation 0.15 --probe-pilot 0.08 --probe-confirm 0.2"
    return f"--tokenizer {corpus.path} {fractions} --out {out} {more}"


def contents(folder: Path) -> dict[str, str]:
    files = json.loads((folder / "manifest.json").read_text())["files"]
    return {name: entry["sha256"] for name, entry in files.items()}


def test_make_shards_gives_what_the_pipeline_in_memory_gives(shards, source, corpus, documents, tmp_path):
    fractions = {name: getattr(CONFIG, name) for name in SPLITS[1:]}
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

    monkeypatch.setattr(workers, "write_chunk", slowly)
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


def kill_in(monkeypatch, owner, name: str, call: int, after: bool = False) -> None:
    """Ends the work in front of the `call`-th call of `owner.name`, or after it."""
    calls, real = [], getattr(owner, name)

    def killed(*arguments, **options):
        calls.append(1)
        result = real(*arguments, **options) if after or len(calls) != call else None
        if len(calls) == call:
            raise Killed
        return result

    monkeypatch.setattr(owner, name, killed)


@pytest.mark.parametrize("where", ["group_near_duplicates", "write_table", "scatter", "count_groups", "write_text"])
def test_make_shards_goes_on_from_every_stage(make, shards, tmp_path, monkeypatch, where):
    kill_in(monkeypatch, builder, where, call=1, after=True)
    with pytest.raises(Killed):
        make(tmp_path / "out")
    monkeypatch.undo()
    assert contents(make(tmp_path / "out")) == contents(shards)


def test_make_shards_goes_on_at_a_gap_left_by_a_slower_process(make, shards, tmp_path, monkeypatch):
    monkeypatch.setattr(builder, "group_near_duplicates", lambda *_, **__: 1 / 0)
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
    write = scatter.write_text
    kill_in(monkeypatch, scatter, "write_text", call=sync)
    with pytest.raises(Killed):
        make(tmp_path / "out")
    left = len(list((tmp_path / "out.building" / "chunks").iterdir()))
    monkeypatch.setattr(scatter, "write_text", write)
    assert contents(make(tmp_path / "out")) == contents(shards)
    # What was synced had been deleted: the ids are on disk once.
    assert left == len(list(chunks.read_chunks(stream_of(source), None, 0, 100_000))) - 3 * (sync - 1)


def test_make_shards_says_when_a_worker_is_gone_and_goes_on(make, shards, tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "write_chunk", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(Stopped, match="a worker was killed .* the same command goes on"):
        make(tmp_path / "out")
    monkeypatch.setattr(workers, "write_chunk", chunks.write_chunk)
    assert contents(make(tmp_path / "out")) == contents(shards)


def test_make_shards_finds_a_damaged_chunk(make, tmp_path, monkeypatch):
    monkeypatch.setattr(builder, "scatter", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make(tmp_path / "out")
    monkeypatch.setattr(builder, "scatter", scatter.scatter)
    path = tmp_path / "out.building" / "chunks" / "00000003" / "tokens"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with pytest.raises(DataError, match=f"{path} is damaged; delete {tmp_path / 'out.building'}"):
        make(tmp_path / "out")


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"text"])
def test_make_shards_finds_damaged_splits(make, tmp_path, monkeypatch, content):
    monkeypatch.setattr(builder, "scatter", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make(tmp_path / "out")
    path = tmp_path / "out.building" / "splits.npy"
    whole = path.read_bytes()
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"{path} is damaged; delete {tmp_path / 'out.building'}"):
        make(tmp_path / "out")
    np.save(path, np.zeros(3, np.int8))
    with pytest.raises(DataError, match=f"{path} is damaged; delete {tmp_path / 'out.building'}"):
        make(tmp_path / "out")
    path.write_bytes(whole)
    with pytest.raises(ZeroDivisionError):
        make(tmp_path / "out")


def test_make_shards_leaves_out_by_name_what_is_too_long_and_what_is_excluded(make, shards, documents, tmp_path):
    longest = max(len(text.encode()) for text in documents)
    made = open_corpus(make(tmp_path / "short", config=dataclasses.replace(CONFIG, max_document_bytes=longest - 1)))
    assert made.manifest["left_out"]["too_long"] == 1
    ((name, size),) = made.manifest["left_out"]["too_long_names"]
    assert size == longest and name not in made.names and len(made.names) == len(open_corpus(shards).names) - 1

    lines = [json.dumps({"text": text}) + "\n" for text in documents]
    (tmp_path / "more.jsonl").write_text("".join(lines[:40]) + "".join(lines[:40]).replace("a", "x").replace("b", "yy"))
    more = stream_of(tmp_path / "more.jsonl")
    rest = open_corpus(make(tmp_path / "rest", stream=more, exclude=(shards,)))
    assert rest.names == [f"more.jsonl:{number}" for number in range(41, 81)]
    assert rest.manifest["left_out"]["excluded"] == 40
    assert rest.groups.min() == 0 and rest.groups.max() < 40
    mixed = {"source": "prepared", "paths": (str(shards), str(rest.path)), "weights": (1.0, 1.0)}
    assert len(prepare(DataConfig(sequence_length=16, **mixed)).names) == len(rest.names) + len(
        open_corpus(shards).names
    )


def test_make_shards_stops_before_max_bytes_also_when_resumed(make, documents, tmp_path, monkeypatch):
    limit = dataclasses.replace(CONFIG, max_bytes=sum(len(text.encode()) for text in documents[:90]) + 3)
    whole = make(tmp_path / "whole", config=limit)
    assert len(open_corpus(whole).names) == len([text for text in documents[:90] if text.strip()])
    kill_in(monkeypatch, workers.Progress, "add", call=4, after=True)
    with pytest.raises(Killed):
        make(tmp_path / "out", config=limit)
    monkeypatch.undo()
    assert contents(make(tmp_path / "out", config=limit))["tokenizer.json"] == contents(whole)["tokenizer.json"]
    assert open_corpus(tmp_path / "out").names == open_corpus(whole).names


def test_make_shards_trains_a_tokenizer_on_the_train_split(make, documents, tmp_path, monkeypatch):
    seen = []
    real = builder.train_tokenizer

    def record(texts, size):
        seen.extend(texts)
        return real(iter(seen), size)

    monkeypatch.setattr(builder, "train_tokenizer", record)
    made = open_corpus(make(tmp_path / "out", tokenizer=None, vocab_size=300))
    alone = np.bincount(made.groups, minlength=len(made.groups))[made.groups] == 1
    held_out = {made.text(i) for i in np.flatnonzero((made.split_indices > 0) & alone)}
    assert made.vocab_size == 300 and held_out and not held_out & set(seen)


def test_make_shards_refuses_what_is_in_the_way(make, shards, source, tmp_path, monkeypatch):
    assert make(shards) == shards  # complete: nothing to do
    with pytest.raises(ConfigError, match="was made with other settings"):
        make(shards, config=dataclasses.replace(CONFIG, seed=3))
    (tmp_path / "there").mkdir()
    with pytest.raises(ConfigError, match="exists and is not a folder of token shards"):
        make(tmp_path / "there")
    monkeypatch.setattr(builder, "scatter", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make(tmp_path / "out")
    with pytest.raises(ConfigError, match="unfinished work that differs in settings; delete it"):
        make(tmp_path / "out", config=dataclasses.replace(CONFIG, seed=3))
    with pytest.raises(ConfigError, match="either --tokenizer or --vocab-size"):
        make(tmp_path / "other", vocab_size=300)
    with pytest.raises(DataError, match="fell into split validation; give more documents, raise --validation"):
        make(tmp_path / "few", stream=stream_of(source / "1.jsonl"), config=make_shards.ShardsConfig())


def test_make_shards_command_ends_with_a_path_or_one_line_and_its_code(shards, source, corpus, tmp_path, capfd):
    limits = "--shard-tokens 4000 --max-document-bytes 100000"
    words = words_of(corpus, tmp_path / "out", f"--paths {source} --workers 1 {limits}")
    assert command.main(words.split()) == 0
    assert capfd.readouterr().out.strip() == str(tmp_path / "out")
    assert contents(tmp_path / "out") == contents(shards)
    assert open_corpus(tmp_path / "out").manifest["command"] == "python -m attnres.commands.make_shards " + words
    for change, code in (("--seed 5", 2), ("--workers 0", 2), ("--validation 1.5", 2)):
        assert command.main(f"{words} {change}".split()) == code
    assert command.main(["--out", str(tmp_path / "x"), "--paths", "nowhere", "--tokenizer", str(corpus.path)]) == 3
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 4 and "nowhere does not exist" in errors[-1]
    # Damage found later names the command that makes the folder again.
    path = tmp_path / "out" / "train-00001.tokens"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(DataError, match="train-00001.tokens ends at byte .* make it again with: python -m attnres"):
        prepare(DataConfig(source="prepared", paths=(str(tmp_path / "out"),), sequence_length=16))


DEEP = "[" * (MOST_DEPTH + 1)


def deep_revision(out: Path) -> None:
    out.with_name("out.revision").write_text(DEEP)


def deep_file(name: str) -> Callable[[Path], None]:
    return lambda out: (out.with_name("out.building") / name).write_text(DEEP)


def deep_manifest(out: Path) -> None:
    shutil.rmtree(out.with_name("out.building"))
    out.mkdir()
    (out / "manifest.json").write_text(DEEP)


@pytest.mark.parametrize(
    ("damage", "source_words", "message"),
    [
        (deep_file("job.json"), None, "job.json is damaged; delete"),
        (deep_file("chunks/00000000/meta.json"), None, "meta.json is damaged; delete"),
        (deep_file("stream.json"), None, "stream.json is damaged; delete"),
        (deep_file("scatter.json"), None, "scatter.json is damaged; delete"),
        (deep_manifest, None, "manifest.json is unreadable"),
        (deep_revision, "--hub some/set", "out.revision is damaged"),
    ],
)
def test_make_shards_command_refuses_a_deeply_nested_file_in_one_line(
    source, corpus, tmp_path, monkeypatch, capfd, damage, source_words, message
):
    out = tmp_path / "out"
    words = words_of(corpus, out, "--workers 1")
    ordinary = f"{words} --paths {source}".split()
    monkeypatch.setattr(builder, "group_near_duplicates", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    assert command.main(ordinary) == 75
    monkeypatch.undo()
    if damage is not deep_manifest and "scatter" not in message:
        (out.with_name("out.building") / "stream.json").unlink()
    damage(out)
    capfd.readouterr()
    assert command.main(f"{words} {source_words}".split() if source_words else ordinary) == 3
    errors = capfd.readouterr().err
    assert [line for line in errors.splitlines() if line.startswith("error: ")] == errors.splitlines()[-1:]
    assert message in errors and "Traceback" not in errors


def test_make_shards_command_shows_no_control_characters_of_a_path(corpus, tmp_path, capfd):
    words = ["--tokenizer", str(corpus.path), "--out", str(tmp_path / "out"), "--paths", "no\x1b[31mwhere"]
    assert command.main(words) == 3
    errors = capfd.readouterr().err
    assert "no?[31mwhere does not exist" in errors and "\x1b" not in errors


def test_make_shards_command_ends_at_once_on_sigterm_and_goes_on(source, corpus, shards, tmp_path):
    """The whole process group is signalled, as a scheduler does it; workers end with their parent."""
    limits = "--shard-tokens 4000 --max-document-bytes 100000"
    words = words_of(corpus, tmp_path / "out", f"--paths {source} --workers 2 {limits}")
    context = multiprocessing.get_context("fork")

    def slowly(*arguments):
        time.sleep(0.1)
        return chunks.write_chunk(*arguments)

    def run():
        os.setsid()
        workers.write_chunk = slowly
        os._exit(command.main(words.split()))

    process = context.Process(target=run)
    process.start()
    while len(list((tmp_path / "out.building" / "chunks").glob("0*"))) < 2:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGTERM)
    process.join(timeout=20)
    assert process.exitcode == 75
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.1)
    else:
        pytest.fail("a worker is left")
    assert not (tmp_path / "out").exists()
    assert command.main(words.split()) == 0
    assert contents(tmp_path / "out") == contents(shards)


def test_training_from_shards_reads_across_them(shards, corpus):
    config = DataConfig(source="prepared", paths=(str(shards),), sequence_length=900, isolate_documents=True)
    made = prepare(config)
    tokens = np.concatenate([np.fromfile(path, made.manifest["dtype"]) for path in made.shards("train")])
    data = TextDataModule(made, config, 2, 4, steps=range(3))
    for batch in data.train_dataloader():
        for ids, window in zip(batch["input_ids"].tolist(), batch["sample_ids"].tolist(), strict=True):
            assert ids == tokens[window * 900 :][:900].tolist()


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
    monkeypatch.setattr(command, "resolve_revision", lambda name, revision: commits.pop(0))
    group = builder.group_near_duplicates
    monkeypatch.setattr(builder, "group_near_duplicates", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    words = words_of(corpus, tmp_path / "out", "--workers 1 --shard-tokens 4000").split()
    assert command.main(words) == 75
    assert "the same command resumes" in capfd.readouterr().err
    monkeypatch.setattr(builder, "group_near_duplicates", group)
    assert command.main(words) == 0
    assert set(loaded) == {("HuggingFaceFW/fineweb-edu", "sample-10BT", "first")}
    made, other = open_corpus(tmp_path / "out"), open_corpus(shards)
    assert made.manifest["source"]["revision"] == "first"
    assert made.fingerprint == other.fingerprint
    assert made.names[0] == "HuggingFaceFW/fineweb-edu:1"


def test_make_shards_keeps_the_commit_of_a_process_that_is_at_work(corpus, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(make_shards, "_LOCK_SECONDS", 0)
    monkeypatch.setattr(command, "resolve_revision", lambda *_: "moved")
    (tmp_path / "out.revision").write_text('{"some/set@main": "first"}')
    with make_shards.making(tmp_path / "out"):
        assert command.main(words_of(corpus, tmp_path / "out", "--hub some/set --revision other").split()) == 2
    assert "is being made by another process" in capfd.readouterr().err
    assert json.loads((tmp_path / "out.revision").read_text()) == {"some/set@main": "first"}


def test_make_shards_from_a_hub_that_breaks_off_ends_with_3_and_keeps_what_it_read(corpus, tmp_path):
    """The clients themselves, against a server on this machine; what they raise differs with place and version."""
    script = [sys.executable, str(Path(__file__).parents[1] / "broken_hub.py"), str(tmp_path)]
    ended = subprocess.run([*script, str(corpus.tokenizer_path)], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    found = {phase: (code, len(lines), kept) for phase, code, lines, kept in json.loads(ended.stdout)}
    assert found == {
        "commit": (3, 1, 0), "listing": (3, 1, 0), "file": (3, 1, 3), "whole": (0, 0, 0), "tokenizer": (3, 1, 0),
        "gone": (3, 1, 0),
    }  # fmt: skip
    said = {phase: "".join(lines) for phase, _, lines, _ in json.loads(ended.stdout)}
    assert "some/set: reading stopped after row 60 (" in said["file"]
    assert "run the same command again to go on from there" in said["file"]
    assert "some/set: cannot be found on the hub (ConnectError: " in said["gone"]
    assert open_corpus(tmp_path / "out").names == [f"some/set:{number}" for number in range(1, 121)]

"""Damage and leaks are found before a corpus is used, whatever its size."""

import json
import os
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from filelock import FileLock

from attnres.data import open_corpus
from attnres.data.corpus import verification
from attnres.data.corpus.manifest import manifest_sha256
from attnres.data.corpus.shards import BLOCK_BYTES, Digest, digest
from attnres.errors import DataError


@pytest.fixture
def copy(corpus, tmp_path):
    """A copy of the corpus to damage."""
    shutil.copytree(corpus.path, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture
def reads(monkeypatch):
    """Corpora of any size count as large; records which files are read in full."""
    monkeypatch.setattr(verification, "VERIFY_BYTES", 0)
    check, read = verification.check_file, []

    def record(path, expected, contents, remedy):
        if contents:
            read.append(path.name)
        check(path, expected, contents, remedy)

    monkeypatch.setattr(verification, "check_file", record)
    return read


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_large_corpus_is_read_once_and_again_after_a_change(copy, corpus, reads):
    open_corpus(copy)
    assert sorted(reads) == sorted(corpus.manifest["files"])
    reads.clear()
    open_corpus(copy)
    assert reads == []
    os.utime(copy / "train.tokens")
    open_corpus(copy)
    assert sorted(reads) == sorted(corpus.manifest["files"])


@pytest.mark.parametrize("stamped", [False, True])
@pytest.mark.parametrize("name", ["train.tokens", "documents.parquet", "tokenizer.json"])
def test_large_corpus_with_one_flipped_bit_is_refused_before_use(copy, reads, stamped, name):
    if stamped:
        open_corpus(copy)
    before = (copy / name).stat()
    flip(copy / name, before.st_size // 2)
    # Even with the time of modification put back.
    os.utime(copy / name, ns=(before.st_atime_ns, before.st_mtime_ns))
    for _ in range(2):
        with pytest.raises(DataError, match=f"data shard {copy / name} is damaged between bytes 0 and ") as error:
            open_corpus(copy)
    assert error.value.code == 3


def test_damage_is_located_to_its_block(tmp_path):
    path, data = tmp_path / "shard", os.urandom(2 * BLOCK_BYTES + 500)
    path.write_bytes(data)
    expected = digest(path)
    assert len(expected["crc32_of_4MiB_blocks"]) == 3
    flip(path, BLOCK_BYTES + 7)
    with pytest.raises(DataError, match=f"between bytes {BLOCK_BYTES} and {2 * BLOCK_BYTES}; mend it"):
        verification.check_file(path, expected, True, "mend it")
    pieces = Digest()
    for size in (0, 10, BLOCK_BYTES, 3, len(data)):
        pieces.update(data[:size])
        data = data[size:]
    assert pieces.result() == expected


def test_large_corpus_in_a_folder_that_cannot_be_written_is_read_each_time(copy, reads, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(FileLock, "acquire", refuse)
    monkeypatch.setattr(os, "replace", refuse)
    for _ in range(2):
        reads.clear()
        open_corpus(copy)
        assert "train.tokens" in reads


def doctor(folder, change):
    """Changes the table of documents and makes every digest fit it, as a wrong program would have written it."""
    table = pq.read_table(folder / "documents.parquet")
    columns = {name: table[name].to_numpy().copy() for name in table.column_names}
    change(columns)
    pq.write_table(pa.table(columns), folder / "documents.parquet")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["documents.parquet"] = digest(folder / "documents.parquet")
    manifest["sha256_of_the_rest"] = manifest_sha256(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def join_across_splits(columns):
    train, held_out = np.flatnonzero(columns["split"] == 0), np.flatnonzero(columns["split"] == 1)
    low, high = sorted((train[0], held_out[0]))
    columns["group"][high] = low


def reach_over(columns):
    last = np.flatnonzero(columns["split"] == 0)[-1]
    columns["tokens"][last] -= 1


def overlap(columns):
    columns["start"][np.flatnonzero(columns["split"] == 2)[1:]] -= 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            join_across_splits,
            r"data leak in .*: documents.jsonl:\d+ is in split (train|validation), its near-duplicate",
        ),
        (reach_over, "data leak in .*: the shards of split train hold"),
        (overlap, "data leak in .*: documents of split probe_pilot overlap or leave gaps"),
    ],
)
def test_open_corpus_refuses_splits_that_leak(copy, change, message):
    doctor(copy, change)
    with pytest.raises(DataError, match=message) as error:
        open_corpus(copy)
    assert error.value.code == 3

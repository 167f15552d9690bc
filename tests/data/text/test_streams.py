"""Streams that are left at any document and taken up behind it."""

import dataclasses
import json
import tomllib
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from packaging.requirements import Requirement

from attnres.data import DataConfig
from attnres.data.text import streams
from attnres.data.text.streams import FileStream, HubStream
from attnres.errors import DataError


@pytest.fixture(scope="module")
def documents(texts) -> list[str]:
    return [*texts[:60], " \n", *texts[60:], ""]


def write_files(folder: Path, documents: list[str]) -> Path:
    folder.mkdir()
    for number, text in enumerate(documents[:4]):
        (folder / f"{number}.txt").write_bytes(text.encode())
    pq.write_table(pa.table({"text": documents[4:40]}), folder / "5.parquet", row_group_size=7)
    (folder / "6.jsonl").write_text("\n\n".join(json.dumps({"text": text}) for text in documents[40:]))
    return folder


def test_file_stream_goes_on_behind_any_document(documents, tmp_path):
    stream = FileStream(DataConfig(source="files", paths=(str(write_files(tmp_path / "files", documents)),)))
    whole = [(document, json.loads(json.dumps(state))) for document, state in stream.read(None)]
    assert [document.text for document, _ in whole] == documents
    for at in range(len(whole)):
        assert list(stream.read(whole[at][1])) == whole[at + 1 :]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_hub_stream_goes_on_behind_any_document(documents, tmp_path, monkeypatch, suffix, caplog):
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
    assert "read again" not in caplog.text
    with pytest.raises(DataError, match="some/set: no column 'body' in .*set --text-column"):
        next(iter(dataclasses.replace(stream, column="body").read(None)))


class Forgetful:
    """Rows of a library that begins anew where it should go on."""

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts

    def __iter__(self):
        return ({"text": text} for text in self.texts)

    def state_dict(self):
        return {"row": "whatever"}

    def load_state_dict(self, state):
        assert state == {"row": "whatever"}


@pytest.mark.parametrize("stop", [3, 40, 100])
def test_hub_stream_does_not_trust_the_position_of_the_library(documents, monkeypatch, caplog, stop):
    """datasets 5.0.0 begins at row 0 when it goes on for the second time."""
    texts = ["", *documents, *documents[:50]]
    monkeypatch.setattr(streams, "load_hub", lambda *_: Forgetful(texts))
    stream = HubStream("some/set")
    whole = [(document, json.loads(json.dumps(state))) for document, state in stream.read(None)]
    assert [document.text for document, _ in whole] == texts
    assert list(stream.read(whole[stop][1])) == whole[stop + 1 :]
    slow = f"does not find row {stop + 1} again; the rows before it are read again and counted"
    assert (slow in caplog.text) == (stop >= streams._ROWS_COMPARED)
    # What an earlier version kept names the rows and holds no digest of them.
    assert list(stream.read([{"row": "whatever"}, stop + 1])) == whole[stop + 1 :]


def test_hub_stream_refuses_a_data_set_that_is_another_one_by_now(documents, monkeypatch):
    monkeypatch.setattr(streams, "load_hub", lambda *_: Forgetful(documents))
    *_, (_, state) = HubStream("some/set").read(None)
    for others in (documents[::-1], documents[:50]):
        monkeypatch.setattr(streams, "load_hub", lambda *_, others=others: Forgetful(others))
        with pytest.raises(DataError, match=f"some/set: the rows up to {len(documents)} are not those that were read"):
            list(HubStream("some/set").read(state))


def test_hub_stream_names_the_row_that_is_not_utf8(tmp_path, monkeypatch):
    damaged = pa.array([b"fine", b"a \xff"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": damaged}), tmp_path / "rows.parquet")
    file = {"data_files": str(tmp_path / "rows.parquet"), "cache_dir": str(tmp_path)}
    rows = datasets.load_dataset("parquet", split="train", streaming=True, **file)
    monkeypatch.setattr(streams, "load_hub", lambda *_: rows)
    with pytest.raises(DataError, match="some/set: text behind row 1 is not UTF-8 .*; give another data set"):
        list(HubStream("some/set").read(None))
    monkeypatch.setattr(streams, "load_hub", lambda *_: Forgetful(["fine", "a \ud800"]))
    with pytest.raises(DataError, match=r"some/set, row 2: 'text' holds the lone surrogate U\+D800 at character 2"):
        list(HubStream("some/set").read(None))


def test_datasets_that_lose_their_place_are_out_of_range():
    with (Path(__file__).parents[3] / "pyproject.toml").open("rb") as file:
        wanted = map(Requirement, tomllib.load(file)["project"]["dependencies"])
    (specifier,) = (requirement.specifier for requirement in wanted if requirement.name == "datasets")
    assert "5.0.0" not in specifier and "5.0.1" in specifier and "4.8.4" in specifier

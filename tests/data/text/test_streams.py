"""Streams that are left at any document and taken up behind it."""

import dataclasses
import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

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

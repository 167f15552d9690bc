"""Documents from files and from the interpreter, and what is refused."""

import bz2
import gzip
import json
import lzma
import os
import sysconfig
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from attnres.data import DataConfig, prepare
from attnres.data.corpus.chunks import read_chunks
from attnres.data.text.sources import Document, list_files, listing
from attnres.data.text.streams import FileStream
from attnres.errors import ConfigError, DataError

TEXTS = ["first\r\ndocument", "zweites Dokument ä", "三"]


def files(*paths: Path, **changes: object) -> DataConfig:
    return DataConfig(source="files", paths=tuple(str(path) for path in paths), **changes)


def documents_of(config: DataConfig) -> list[Document]:
    most = config.max_bytes or float("inf")
    return [
        document for chunk in read_chunks(FileStream(config), None, 0, max_bytes=most) for document in chunk.documents
    ]


def texts_of(config: DataConfig) -> list[str]:
    return [document.text for document in documents_of(config)]


def test_file_stream_is_the_same_from_txt_jsonl_and_parquet(tmp_path):
    (tmp_path / "txt").mkdir()
    for number, text in enumerate(TEXTS):
        (tmp_path / "txt" / f"{number}.txt").write_bytes(text.encode())
    lines = [json.dumps({"body": text}) for text in TEXTS]
    (tmp_path / "rows.jsonl").write_text("\n\n".join(lines), encoding="utf-8")
    pq.write_table(pa.table({"id": [1, 2, 3, 4], "body": [*TEXTS, None]}), tmp_path / "rows.parquet")
    assert texts_of(files(tmp_path / "txt")) == TEXTS
    assert texts_of(files(tmp_path / "txt" / "*.txt")) == TEXTS
    assert texts_of(files(tmp_path / "rows.jsonl", text_column="body")) == TEXTS
    assert texts_of(files(tmp_path / "rows.parquet", text_column="body")) == TEXTS
    assert [d.name for d in documents_of(files(tmp_path / "rows.jsonl", text_column="body"))] == [
        "rows.jsonl:1",
        "rows.jsonl:3",
        "rows.jsonl:5",
    ]


def compressed(content: bytes, codec: str) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, codec) as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


LINES = "\n\n".join(json.dumps({"text": text}) for text in TEXTS).encode()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.JSONL", LINES),
        ("a.ndjson", LINES),
        ("a.jsonl.zst", compressed(LINES[:9], "zstd") + compressed(LINES[9:], "zstd")),
        ("a.Jsonl.GZ", gzip.compress(LINES[:9]) + gzip.compress(LINES[9:])),
        ("a.jsonl.bz2", bz2.compress(LINES)),
        ("a.jsonl.lz4", compressed(LINES, "lz4")),
        ("a.jsonl.xz", lzma.compress(LINES[:9]) + lzma.compress(LINES[9:])),
        ("a.json", LINES),
        ("a.json", json.dumps([{"text": text} for text in TEXTS]).encode()),
        ("a.json.gz", gzip.compress(json.dumps([{"text": text} for text in TEXTS], indent=1).encode())),
        ("a.csv", pd.DataFrame({"id": [1, 2, 3], "text": TEXTS}).to_csv(index=False).encode()),
        ("a.tsv.gz", gzip.compress(pd.DataFrame({"text": TEXTS}).to_csv(index=False, sep="\t").encode())),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_file_stream_reads_each_format_and_goes_on_in_it(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    (tmp_path / "b.txt").write_text("last")
    stream = FileStream(files(tmp_path))
    whole = list(stream.read(None))
    assert [document.text for document, _ in whole] == [*TEXTS, "last"]
    for at in range(len(whole)):
        assert list(stream.read(whole[at][1])) == whole[at + 1 :]


def test_file_stream_reads_a_json_object_over_many_lines_and_a_compressed_text(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"text": TEXTS[0]}, indent=2))
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(TEXTS[0].encode()))
    assert texts_of(files(tmp_path)) == [TEXTS[0]] * 2


def test_folder_is_read_without_hidden_files_and_says_what_else_is_left_out(tmp_path, caplog):
    made = {"cache_dir": str(tmp_path / "cache")}
    hidden = (".e.txt", ".git/f.txt", "sub/.ipynb_checkpoints/c.txt", "cache/made/g.txt")
    for name in ("a.txt", "b.md", "sub/c.PY", "d.pdf", "LICENSE", *hidden):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert texts_of(files(tmp_path, **made)) == ["a.txt"]
    assert texts_of(files(tmp_path, suffixes=[".md", ".py"], **made)) == ["b.md", "sub/c.PY"]
    assert texts_of(files(tmp_path / "a.txt", tmp_path / "b.md", suffixes=[".md"])) == ["a.txt", "b.md"]
    with pytest.raises(DataError, match=r"no .rst file in folder .*; name another, or the suffixes of its text"):
        texts_of(files(tmp_path, suffixes=[".rst"]))
    with pytest.raises(DataError, match="fell into split"):
        prepare(files(tmp_path, **made))
    (line,) = [record.message for record in caplog.records if "left out" in record.message]
    assert (
        "data.paths: 4 files are left out: 1 without a suffix, 1 .md, 1 .pdf, 1 .py (LICENSE, b.md, d.pdf, ...)" in line
    )


def test_file_stream_skips_blank_documents_and_reads_a_file_once(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_text(" \n")
    assert texts_of(files(tmp_path, tmp_path / "a.txt")) == ["a"]


def test_file_stream_stops_before_max_bytes(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text("ä" * 5, encoding="utf-8")
    assert len(texts_of(files(tmp_path, max_bytes=29))) == 2
    assert len(texts_of(files(tmp_path, max_bytes=30))) == 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text"', "a.jsonl, line 2: not JSON"),
        ("a.jsonl", b'{"body": "x"}', r"line 1: no 'text' in \['body'\]; set data.text_column"),
        ("a.jsonl", b'{"text": 3}', "line 1: 'text' holds int, not text"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "a \\ud800"}', r"line 2: 'text' holds the lone surrogate U\+D800 at"),
        ("a.txt", b"ok \xff", "a.txt: not UTF-8 at byte 3"),
        ("a.parquet", b"no", "a.parquet: not a parquet file"),
        ("a.pdf", b"no", "cannot read .*a.pdf; expected one of .txt, .* name its suffix in data.suffixes"),
        ("a.json", b'[{"text": 3}]', "a.json, row 1: 'text' holds int, not text"),
        ("a.json", b"[\n{", "a.json: neither one JSON value nor one in each line"),
        ("a.json", b'{"name": "x"}', r"a.json, line 1: no 'text' in \['name'\]; .* or leave such files out"),
        ("a.csv", b"text\n\xff", "a.csv: unreadable behind row 0 .*; correct it"),
        ("a.txt.gz", gzip.compress(b"text" * 9)[:-9], "cannot read .*a.txt.gz: .*; restore it or leave it out"),
        ("a.txt.xz", lzma.compress(b"text" * 9)[:-9], "cannot read .*a.txt.xz: .*; restore it or leave it out"),
        ("a.jsonl.zst", b"no", "cannot read .*a.jsonl.zst: .*; restore it or leave it out"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_file_stream_names_what_it_cannot_read(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        texts_of(files(tmp_path / name))


def test_file_stream_names_a_missing_parquet_column(tmp_path):
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"no column 'text' in \['body'\]; set data.text_column"):
        texts_of(files(tmp_path / "a.parquet"))


def test_file_stream_names_the_row_of_a_parquet_file_that_is_not_utf8(tmp_path):
    damaged = pa.array([b"fine", b"a \xff", b"fine"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": damaged}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="a.parquet, row 2: 'text' is not UTF-8 at byte 2; convert it or leave the row"):
        texts_of(files(tmp_path / "a.parquet"))


def test_document_of_a_file_whose_name_is_not_utf8_has_a_name_that_tables_hold(tmp_path):
    with open(os.fsencode(tmp_path) + b"/\xff.txt", "w") as file:
        file.write("text")
    assert documents_of(files(tmp_path)) == [Document(r"\udcff.txt", "text")]


def test_prepare_without_text_is_a_data_error(tmp_path):
    (tmp_path / "a.txt").write_text("  ")
    with pytest.raises(DataError, match="holds no text") as empty:
        prepare(files(tmp_path, cache_dir=str(tmp_path / "cache")))
    with pytest.raises(DataError, match="nowhere does not exist") as missing:
        prepare(files(tmp_path / "nowhere", cache_dir=str(tmp_path / "cache")))
    assert empty.value.code == missing.value.code == 3


def test_listing_changes_with_a_file(tmp_path):
    config = files(tmp_path)
    (tmp_path / "a.txt").write_text("a")
    before = listing(config)
    assert listing(config) == before
    (tmp_path / "a.txt").write_text("ab")
    assert listing(config) != before


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("pystdlib", ["alone.py", "package/a.py", "package/sub/b.py"]),
        ("pyenv", ["alone.py", "package/README.md", "package/a.py", "package/sub/b.py", "package/typed.pyi"]),
    ],
)
def test_list_files_of_the_interpreter_leaves_out_tests_and_nested_packages(source, expected, tmp_path, monkeypatch):
    left_out = [
        "_sysconfigdata__linux.py",
        "package/__pycache__/a.py",
        "package/data.bin",
        "package/tests/c.py",
        "package-1.0.dist-info/LICENSE.txt",
        "site-packages/other.py",
        "test/d.py",
    ]
    for name in [*expected, *left_out]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text")
    (tmp_path / "dangling.py").symlink_to(tmp_path / "nowhere.py")
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    config = DataConfig(source=source)
    assert [file.name for file in list_files(config)] == expected
    assert len(texts_of(config)) == len(listing(config)) == len(expected)


def test_file_stream_of_the_interpreter_skips_what_is_not_utf8(tmp_path, monkeypatch):
    (tmp_path / "a.py").write_text("text")
    (tmp_path / "latin.py").write_bytes(b"# \xe4")
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    assert texts_of(DataConfig()) == ["text"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "web"}, "data.source: expected one of pystdlib, pyenv, files, prepared, got 'web'"),
        ({"source": "files"}, "data.paths: expected at least one path"),
        ({"paths": ("a.txt",)}, "set data.source=files or prepared"),
        ({"source": "files", "paths": "a.txt"}, r"expected a list, got 'a.txt'; write \[a.txt\]"),
        ({"source": "prepared"}, "data.paths: expected at least one path"),
        ({"source": "prepared", "paths": ("a", "b")}, "data.weights: expected 2 .* got 0"),
        ({"source": "prepared", "paths": ("a",), "weights": (1.0,)}, "data.weights: expected 0"),
        ({"source": "prepared", "paths": ("a", "b"), "weights": (1.0, 0.0)}, "data.weights: expected numbers above 0"),
        ({"suffixes": (".md",)}, "data.suffixes: expected none with data.source=pystdlib"),
        ({"source": "files", "paths": ("a",), "suffixes": ".md"}, r"expected a list, got '.md'; write \[.md\]"),
        ({"source": "files", "paths": ("a",), "suffixes": ("md",)}, "expected endings such as .md, got 'md'"),
        ({"vocab_size": 256}, "data.vocab_size: expected an integer of at least 257, got 256"),
        ({"sequence_length": 0}, "data.sequence_length"),
        ({"seed": -1}, "data.seed"),
        ({"max_bytes": 0}, "data.max_bytes"),
        ({"validation": 0.0}, "data.validation: expected a fraction"),
        ({"probe_confirm": 0.9}, "expected less than 1, got 1.02"),
    ],
)
def test_data_config_names_the_impossible_field(changes, message):
    with pytest.raises(ConfigError, match=message):
        DataConfig(**changes)


def test_file_stream_names_a_line_that_is_nested_too_deeply_to_be_read(tmp_path, monkeypatch):
    def too_deep(line):
        raise RecursionError("maximum recursion depth exceeded")

    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    monkeypatch.setattr("json.loads", too_deep)
    with pytest.raises(DataError, match="a.jsonl, line 1: not JSON"):
        texts_of(files(tmp_path / "a.jsonl"))

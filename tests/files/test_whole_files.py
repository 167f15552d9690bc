"""Whole files, the bounded reader of JSON, locks, and the errors of a system that refuses to write."""

import errno
import json
import multiprocessing
import os
import stat
import time
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from attnres import faults
from attnres.errors import ConfigError, StorageError
from attnres.files.whole_files import (
    MOST_BYTES,
    MOST_DEPTH,
    REFUSALS,
    locked,
    read_json,
    read_object,
    storage_errors,
    whole_file,
    write_json,
    write_text,
)


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_write_text_keeps_every_character(tmp_path):
    text = "α\r\nβ\n\x00"
    write_text(tmp_path / "a", text)
    assert (tmp_path / "a").read_bytes() == text.encode()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_write_json_is_sorted_and_refuses_nan(tmp_path):
    write_json(tmp_path / "a.json", {"b": 1, "a": [None, True]})
    assert read_json(tmp_path / "a.json") == {"a": [None, True], "b": 1}
    assert (tmp_path / "a.json").read_text().index('"a"') < (tmp_path / "a.json").read_text().index('"b"')
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert contents(tmp_path) == before


@pytest.mark.parametrize("failure", [RuntimeError("stop"), KeyboardInterrupt(), SystemExit(3)])
def test_whole_file_leaves_the_old_file_where_writing_fails(tmp_path, failure):
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(type(failure)), whole_file(path) as temporary:
        temporary.write_text("half")
        raise failure
    assert contents(tmp_path) == {"a": "old"}


def test_whole_file_leaves_the_old_file_where_the_disk_fails_at_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(faults, "_armed", faults.Fault.parse("write:enospc"))
    (tmp_path / "a").write_text("old")
    with pytest.raises(OSError, match="No space"):
        write_text(tmp_path / "a", "new")
    assert contents(tmp_path) == {"a": "old"}


def test_whole_file_appears_only_when_it_is_flushed(tmp_path, monkeypatch):
    path, order = tmp_path / "a", []
    flush, rename = os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda fd: (order.append("folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file"), flush(fd))
    )
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append("rename"), rename(a, b)))
    with whole_file(path) as temporary:
        temporary.write_text("new")
        assert not path.exists() and temporary.parent == tmp_path
    assert order == ["file", "rename", "folder"] and path.read_text() == "new"


@pytest.mark.parametrize("name", ["a", ".tmp-a"])
def test_whole_file_never_writes_through_a_link(tmp_path, name):
    outside = tmp_path / "precious"
    outside.write_text("precious")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / name).symlink_to(outside)
    write_text(folder / "a", "new")
    assert outside.read_text() == "precious"
    assert contents(folder) == {"a": "new"} and not (folder / "a").is_symlink()


def nested(depth: int, opening: str = "[", closing: str = "]") -> str:
    return opening * depth + closing * depth


@pytest.mark.parametrize(("opening", "inner", "closing"), [("[", "", "]"), ('{"a":', "1", "}"), ('[{"a":', "1", "}]")])
def test_read_json_refuses_one_level_too_many_before_parsing(tmp_path, monkeypatch, opening, inner, closing):
    path, each = tmp_path / "a.json", sum(opening.count(sign) for sign in "[{")
    path.write_text(opening * (MOST_DEPTH // each) + inner + closing * (MOST_DEPTH // each))
    assert read_json(path) == json.loads(path.read_text())
    monkeypatch.setattr(json, "loads", lambda text: pytest.fail("parsed"))
    path.write_text("[" + path.read_text() + "]")
    with pytest.raises(ValueError, match=f"deeper than {MOST_DEPTH}"):
        read_json(path)


@pytest.mark.parametrize(
    "text",
    [
        *(json.dumps("[" * 100), json.dumps({"{" * 100: "[" * 100}), json.dumps(['"' + "[" * 100])),
        # An escaped quote ends no string, an escaped backslash escapes no quote.
        *(r'["\"' + "[" * 100 + r'\\"]', r'["\\", "' + "{" * 100 + '"]', json.dumps("α∀" + "[" * 100)),
    ],
)
def test_read_json_counts_no_bracket_inside_a_string(tmp_path, text):
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    assert read_json(tmp_path / "a.json") == json.loads(text)


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(b'["\\\\"' + b"[" * 65, id="behind an escaped backslash"),
        pytest.param(b'"a" ' + b"[" * 65 + b'"', id="between two strings"),
        # In UTF-16 a byte of another character looks like a quote, behind which brackets would not be counted.
        pytest.param(('["\u2200"' + "," + nested(MOST_DEPTH + 1) + "]").encode("utf-16-le"), id="UTF-16"),
        pytest.param(b"", id="empty"),
        pytest.param(b"[1, 2", id="cut off"),
        pytest.param(b'["a', id="string without an end"),
        pytest.param(b'["a\\', id="escape without an end"),
        pytest.param(b"]" * 1000 + b"[" * 1000, id="closed before it is opened"),
        pytest.param(b"[" + b"9" * 5000 + b"]", id="a number of 5000 digits"),
        pytest.param(b'["\xff"]', id="no UTF-8"),
        pytest.param(b'"' + b"\\" * 1_000_001, id="a million escapes"),
    ],
)
def test_read_json_refuses_with_a_value_error(tmp_path, raw):
    (tmp_path / "a.json").write_bytes(raw)
    with pytest.raises(ValueError):
        read_json(tmp_path / "a.json")


def test_read_json_refuses_a_large_file_by_its_size_alone(tmp_path, monkeypatch):
    with open(tmp_path / "a.json", "wb") as stream:
        stream.truncate(MOST_BYTES + 1)
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail("read"))
    with pytest.raises(ValueError, match="at most"):
        read_json(tmp_path / "a.json")


def test_read_json_takes_a_file_of_the_largest_size(tmp_path):
    (tmp_path / "a.json").write_text("[10]")
    assert read_json(tmp_path / "a.json", most_bytes=4) == [10]
    (tmp_path / "a.json").write_text("[100]")
    with pytest.raises(ValueError, match="5 bytes"):
        read_json(tmp_path / "a.json", most_bytes=4)


def test_read_json_refuses_what_is_no_regular_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(ValueError, match="not a regular file"):
            read_json(path)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none")


@pytest.mark.parametrize("text", ["[]", "1", "null", '"a"'])
def test_read_object_refuses_every_other_value(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match="expected a JSON object"):
        read_object(tmp_path / "a.json")


def _hold(path: Path, held: Event) -> None:
    with locked(path, "busy"):
        held.set()
        time.sleep(300)


def test_locked_refuses_while_another_process_holds_it_and_dies_with_it(tmp_path):
    context = multiprocessing.get_context("spawn")
    held = context.Event()
    holder = context.Process(target=_hold, args=(tmp_path / "lock", held))
    holder.start()
    try:
        assert held.wait(60)
        with pytest.raises(ConfigError, match="^busy$"), locked(tmp_path / "lock", "busy", timeout=0.1):
            pytest.fail("held twice")
    finally:
        holder.kill()
        holder.join()
    with locked(tmp_path / "lock", "busy"):
        pass


def test_locked_is_free_again_after_an_error(tmp_path):
    with pytest.raises(RuntimeError), locked(tmp_path / "lock", "busy"):
        raise RuntimeError
    with locked(tmp_path / "lock", "busy"):
        pass


def test_locked_says_where_no_lock_can_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError), locked(tmp_path / "file" / "lock", "busy"):
        pytest.fail("held")


@pytest.mark.parametrize("number", sorted(REFUSALS), ids=errno.errorcode.get)
def test_storage_errors_name_the_place(number):
    with (
        pytest.raises(StorageError, match=rf"^runs/a: {os.strerror(number)} \(elsewhere\); free some space$") as raised,
        storage_errors(Path("runs/a"), "free some space"),
    ):
        raise OSError(number, os.strerror(number), "elsewhere")
    assert isinstance(raised.value.__cause__, OSError)


def test_storage_errors_take_every_kind_where_nothing_else_is_done():
    stale = os.strerror(errno.ESTALE)
    with pytest.raises(StorageError, match=f"^runs/a: {stale}; r$"), storage_errors(Path("runs/a"), "r", every=True):
        raise OSError(errno.ESTALE, stale)


@pytest.mark.parametrize(
    "error", [*(OSError(n, os.strerror(n)) for n in (errno.ENOENT, errno.ECHILD, errno.EINTR)), ValueError("no")]
)
def test_storage_errors_let_others_pass(error):
    with pytest.raises(type(error)) as raised, storage_errors(Path("runs"), "remedy"):
        raise error
    assert raised.value is error

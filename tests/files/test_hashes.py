"""Hashes name folders on disk: their spelling is part of the format."""

import hashlib
import json

import pytest

from attnres.files.hashes import content_hash, sha256_of

PLAIN = {"b": [1, 2.5, None, True], "a": {"z": "α", "y": ""}}


def test_content_hash_is_that_of_sorted_json():
    compact, spaced = '{"a":{"y":"","z":"\\u03b1"},"b":[1,2.5,null,true]}', json.dumps(PLAIN, sort_keys=True)
    assert content_hash(PLAIN) == hashlib.sha256(compact.encode()).hexdigest()
    assert content_hash(PLAIN, spaced=True) == hashlib.sha256(spaced.encode()).hexdigest() != content_hash(PLAIN)


def test_content_hash_does_not_depend_on_the_order_of_keys_and_on_nothing_else():
    assert content_hash({"a": PLAIN["a"], "b": PLAIN["b"]}) == content_hash(PLAIN)
    others = [PLAIN | {"b": [2.5, 1, None, True]}, PLAIN | {"b": [1, 2.5, None, 1]}, PLAIN | {"c": None}, [PLAIN]]
    assert len({content_hash(other) for other in (PLAIN, *others)}) == 1 + len(others)


def test_content_hash_refuses_what_is_not_plain():
    with pytest.raises(TypeError):
        content_hash({"a": {1, 2}})


@pytest.mark.parametrize("size", [0, 1, 2**20 + 1])
def test_sha256_of_a_file_is_that_of_its_bytes(tmp_path, size):
    (tmp_path / "a").write_bytes(bytes(size))
    assert sha256_of(tmp_path / "a") == hashlib.sha256(bytes(size)).hexdigest()

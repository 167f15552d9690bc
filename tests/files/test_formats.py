"""The version of a folder's files."""

from pathlib import Path

import pytest

from attnres.errors import CheckpointError, DataError
from attnres.files.formats import KEY, VERSION, check_format


@pytest.mark.parametrize("plain", [{}, {KEY: VERSION}])
def test_check_format_takes_this_version_and_folders_that_name_none(plain):
    check_format(plain, Path("a"), DataError, "convert it")
    assert VERSION == 1


@pytest.mark.parametrize("version", [0, 2, "1", None, [1]])
def test_check_format_refuses_another_version_in_one_line_with_the_remedy(version):
    with pytest.raises(CheckpointError, match=r"^runs/a: format .*; convert it$"):
        check_format({KEY: version}, Path("runs/a"), CheckpointError, "convert it")


def test_check_format_of_a_later_version_refuses_folders_that_name_none():
    with pytest.raises(DataError, match="format 1, this version reads format 2"):
        check_format({}, Path("a"), DataError, "convert it", version=2)

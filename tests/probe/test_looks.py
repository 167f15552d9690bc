"""Earlier looks: which probes beside a new one had results for its cells before it was registered."""

import json
from dataclasses import replace

import pytest

from attnres.probe.looks import RESULTS, earlier_looks
from tests.probe.probed_tables import FAMILIES, WHOLE, measured, write_folder

TABLES = measured()


def probed(folder, *families, config=WHOLE, with_results=True, **changed):
    write_folder(folder, *TABLES, config, families or FAMILIES, **changed)
    if with_results:
        (folder / RESULTS).touch()
    return json.loads((folder / "preregistration.json").read_text())


def test_a_probe_that_judges_the_same_cells_by_another_margin_is_a_look(tmp_path):
    probed(tmp_path / "probe_a", "embedding", config=replace(WHOLE, margin=0.02))
    registered = probed(tmp_path / "probe_b")
    (look,) = earlier_looks(tmp_path / "probe_b", registered)
    assert look == {
        "folder": "probe_a",
        "written": "2026-01-01T00:00:00+00:00",
        "cells": sum(":embedding@" in cell for cell in registered["cells"]),
        "same_windows": True,
        "differs": {"margin": 0.02, "families": ["embedding"]},
    }


@pytest.mark.parametrize(
    ("families", "changed"),
    [
        (["current"], {}),  # a part of the same swept grid
        (["embedding"], {"with_results": False}),  # nothing to look at yet
        (["embedding"], {"hashes": {"data": "abc", "checkpoint": "another"}}),
    ],
)
def test_what_is_no_look(tmp_path, families, changed):
    probed(tmp_path / "probe_a", *families, **changed)
    registered = probed(tmp_path / "probe_b", "embedding")
    assert earlier_looks(tmp_path / "probe_b", registered) == []


@pytest.mark.parametrize("text", ["", "[]", '{"cells": 3}', '{"cells": ["mask:embedding@attn.early"]}'])
def test_a_folder_that_no_probe_wrote_is_passed_over(tmp_path, text):
    probed(tmp_path / "probe_a")
    (tmp_path / "probe_a" / "preregistration.json").write_text(text)
    assert earlier_looks(tmp_path / "probe_b", probed(tmp_path / "probe_b")) == []

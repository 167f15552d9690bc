"""Earlier looks: which probes beside a new one had results for its cells before it was registered."""

import json

import pytest

from attnres.probe.earlier_probes import RESULTS, earlier_looks

FAMILIES = ("embedding", "current")


def probed(folder, *families, margin=0.005, with_results=True, checkpoint="def"):
    """What a probe of these families leaves of its plan; `preregistration` in `outputs.py` makes the real one."""
    families = families or FAMILIES
    registered = {
        "written": "2026-01-01T00:00:00+00:00",
        "cells": [f"mask:{family}@{sublayer}.early" for family in families for sublayer in ("attn", "mlp")],
        "statistics": {"margin": margin, "seed": 0},
        "probe": {"families": families, "length": 64},
        "splits": {"sha256": {"confirm": "windows"}},
        "hashes": {"checkpoint": checkpoint},
    }
    folder.mkdir()
    (folder / "preregistration.json").write_text(json.dumps(registered))
    if with_results:
        (folder / RESULTS).touch()
    return registered


def test_a_probe_that_judges_the_same_cells_by_another_margin_is_a_look(tmp_path):
    probed(tmp_path / "probe_a", "embedding", margin=0.02)
    (look,) = earlier_looks(tmp_path / "probe_b", probed(tmp_path / "probe_b"))
    assert look == {
        "folder": "probe_a",
        "written": "2026-01-01T00:00:00+00:00",
        "cells": 2,
        "same_windows": True,
        "differs": {"margin": 0.02, "families": ["embedding"]},
    }


@pytest.mark.parametrize(
    ("families", "changed"),
    [
        (["current"], {}),  # a part of the same swept grid
        (["embedding"], {"with_results": False}),  # nothing to look at yet
        (["embedding"], {"checkpoint": "another"}),
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

"""Earlier probes: which probes beside a new one had results for its cells before it was registered."""

import json

import pytest

from attnres.probe.earlier_probes import RESULTS, earlier_probes

FAMILIES = ("embedding", "current")


def probed(folder, *families, margin=0.005, with_results=True, checkpoint="def"):
    """What a probe of these families leaves of its plan; `attnres.probe.preregistration` makes the real one."""
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


def test_a_probe_that_judges_the_same_cells_by_another_margin_is_an_earlier_one(tmp_path):
    probed(tmp_path / "probe_a", "embedding", margin=0.02)
    (earlier,) = earlier_probes(tmp_path / "probe_b", probed(tmp_path / "probe_b"))
    assert earlier == {
        "folder": "probe_a",
        "written": "2026-01-01T00:00:00+00:00",
        "cells": 2,
        "same_windows": True,
        "differs": {"margin": 0.02, "families": ["embedding"]},
    }


@pytest.mark.parametrize(
    ("families", "changed"),
    [
        (["current"], {}),  # a member of the same swept grid
        (["embedding"], {"with_results": False}),  # nothing to look at yet
        (["embedding"], {"checkpoint": "another"}),
    ],
)
def test_what_is_no_earlier_probe(tmp_path, families, changed):
    probed(tmp_path / "probe_a", *families, **changed)
    registered = probed(tmp_path / "probe_b", "embedding")
    assert earlier_probes(tmp_path / "probe_b", registered) == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"cells": 3}',
        '{"cells": ["mask:embedding@attn.early"]}',
        '{"cells": ' + 64 * "[" + 64 * "]" + "}",  # 65 deep
    ],
    ids=["empty", "list", "number", "lacking", "depth 65"],
)
def test_a_folder_that_no_probe_wrote_is_skipped_with_one_warning(tmp_path, caplog, text):
    probed(tmp_path / "probe_a", "embedding")
    probed(tmp_path / "probe_c", "embedding")
    damaged = tmp_path / "probe_a" / "preregistration.json"
    damaged.write_text(text)
    (earlier,) = earlier_probes(tmp_path / "probe_b", probed(tmp_path / "probe_b"))
    assert earlier["folder"] == "probe_c"
    (warning,) = caplog.messages
    assert str(damaged) in warning and "skipped" in warning

"""Several probes in one report: what differs, seeds without p-values, a path along training, hostile text."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from attnres.commands import report as report_command
from attnres.errors import ConfigError
from attnres.report import comparison as report_compare
from attnres.report import runs as report_runs
from tests.report.test_report import HOSTILE, Page
from tests.tables.fake_folder import write_fake


@pytest.fixture(scope="module")
def tables_once(tmp_path_factory) -> Path:
    return write_fake(tmp_path_factory.mktemp("tables") / "run")


@pytest.fixture
def make(tables_once, tmp_path, monkeypatch):
    """Makes the folder of a run; its figures are drawn in one test only."""
    monkeypatch.setattr(report_compare, "draw", lambda entries, runs: {entry.section: [] for entry in entries})

    def inner(name: str, shift: float = 0.0, experiment: str = "attnres_small", **model) -> Path:
        folder = Path(shutil.copytree(tables_once, tmp_path / name))
        summary = json.loads((folder / "summary.json").read_text())
        facts = {"experiment": experiment, "run": f"{experiment}-{name}", "seed": 0, "step": 1200}
        summary["models"][0] |= facts | model
        summary["provenance"]["hashes"] = {"data": "d0"}
        (folder / "summary.json").write_text(json.dumps(summary))
        effects = pd.read_parquet(folder / "effects.parquet")
        effects["dnll"] += shift * (effects["model"] == "attnres")
        effects.to_parquet(folder / "effects.parquet")
        return folder

    return inner


def text(folders, tmp_path) -> tuple[str, str]:
    report_compare.write_comparison(folders, tmp_path / "out")
    return tuple((tmp_path / "out" / name).read_text(encoding="utf-8") for name in ("report.html", "report.md"))


def test_runs_are_labelled_by_what_tells_them_apart(make):
    seeds = report_runs.read_runs([make("a", seed=0), make("b", seed=1)])
    assert [r.label for r in seeds] == ["seed 0", "seed 1"]
    steps = report_runs.read_runs([make("c", run="r", step=100), make("d", run="r", step=1200)])
    assert [r.label for r in steps] == ["step 100", "step 1200"]
    arms = report_runs.read_runs([make("g", seed=0), make("h", experiment="same_base_full", seed=0)])
    assert [r.label for r in arms] == ["attnres_small", "same_base_full"]
    same = report_runs.read_runs([make("e"), make("f")])
    assert [r.label for r in same] == ["attnres_small (e)", "attnres_small (f)"]


def test_groups_are_seeds_of_one_experiment_and_steps_of_one_training(make):
    folders = [make("a", seed=0), make("b", seed=1), make("c", run="attnres_small-a", step=300),
               make("d", experiment="same_base_full", seed=0)]  # fmt: skip
    runs = report_runs.read_runs(folders)
    assert [[r.folder.name for r in g] for g in report_runs.seed_groups(runs)] == [["a", "b"]]
    assert [[r.folder.name for r in g] for g in report_runs.trainings(runs)] == [["c", "a"]]


def test_comparison_says_what_differs_and_warns_of_other_text(make, tmp_path):
    folders = [make("a", seed=0, training={"optim": {"lr": 0.1, "wandb_api_key": "hunter2"}}),
               make("b", seed=1, training={"optim": {"lr": 0.3, "wandb_api_key": "hunter3"}})]  # fmt: skip
    summary = json.loads((folders[1] / "summary.json").read_text())
    summary["provenance"]["hashes"]["data"] = "d1"
    (folders[1] / "summary.json").write_text(json.dumps(summary))
    varied, same = report_runs.differences(report_runs.read_runs(folders))
    values = dict(varied)
    assert values["training.optim.lr"] == ["0.1", "0.3"] and values["hashes.data"] == ["d0", "d1"]
    assert values["trained.seed"] == ["0", "1"] and same > 10
    html, md = text(folders, tmp_path)
    for shown in (Page(html).text, md):
        assert "The runs do not share the same text" in shown and "training.optim.lr" in shown
        assert "2 seeds are too few for a p-value over seeds" in shown and "hunter" not in shown


def test_seed_table_has_a_p_value_from_six_seeds_on(make):
    few = report_runs.read_runs([make(f"few{k}", seed=k) for k in range(5)])
    assert report_compare.seed_table(few)["p"].isna().all()
    many = report_runs.read_runs([make(f"many{k}", seed=k) for k in range(6)])
    table = report_compare.seed_table(many)
    # All seeds agree: two of the 64 assignments of signs are as extreme.
    np.testing.assert_allclose(table["p"], 2 / 64, atol=0.01)
    np.testing.assert_allclose(table["mean"], table["least"])


def test_paired_contrasts_recover_a_shift_on_the_same_windows(make):
    runs = report_runs.read_runs([make("a", shift=0.5), make("b", experiment="same_base_full")])
    table, why_not = report_compare.paired_contrasts(runs)
    assert why_not == "" and len(table) == 19
    np.testing.assert_allclose(table["diff"], 0.5, atol=1e-6)
    assert set(table["verdict"]) == {"trained larger"} and set(table["baseline"]) == {runs[1].label}


def test_runs_on_other_windows_are_compared_unpaired_and_say_so(make, tmp_path):
    folders = [make("a"), make("b", seed=1)]
    effects = pd.read_parquet(folders[1] / "effects.parquet")
    effects[effects["window"] > 3].to_parquet(folders[1] / "effects.parquet")
    html, md = text(folders, tmp_path)
    for shown in (Page(html).text, md):
        assert "The runs do not share the same windows" in shown and "so their effects cannot be paired" in shown


def test_comparison_command_draws_every_figure_and_writes_in_its_folder(make, tmp_path, monkeypatch, capsys):
    folders = [make("a", seed=0), make("b", seed=1), make("c", run="attnres_small-a", step=300)]
    before = {f: f.stat().st_mtime_ns for folder in folders for f in folder.rglob("*")}
    monkeypatch.undo()
    assert report_command.main([*map(str, folders), "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out' / 'report.html'}\n"
    assert {f: f.stat().st_mtime_ns for folder in folders for f in folder.rglob("*")} == before
    names = sorted(f.name for f in (tmp_path / "out" / "figures").iterdir())
    assert names == ["paired.svg", "seeds-0.svg", "side.svg", "steps-0.svg"]
    page = Page((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    assert [a["id"] for a in page.all("h2")] == [a["href"][1:] for a in page.all("a")] == [
        "claims", "runs", "differ", "side", "seeds", "steps", "paired", "cells", "provenance"
    ]  # fmt: skip


def test_seeds_of_one_experiment_are_drawn_once(make, tmp_path, monkeypatch):
    folders = [make("a", seed=0), make("b", seed=1)]
    monkeypatch.undo()
    report = report_compare.write_comparison(folders, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out" / "figures").iterdir()) == ["paired.svg", "seeds-0.svg"]
    assert 'href="#side"' not in report.read_text() and 'id="side"' not in report.read_text()


def test_comparison_refuses_a_folder_named_twice(make):
    folder = make("a")
    with pytest.raises(ConfigError, match="named twice"):
        report_runs.read_runs([folder, folder / ".." / "a"])


def test_comparison_escapes_hostile_text(make, tmp_path):
    clean, _ = text([make("a"), make("b", seed=1)], tmp_path)
    folders = [make("c", experiment=HOSTILE, run=HOSTILE, training={HOSTILE: HOSTILE}), make("d", seed=HOSTILE)]
    for folder in folders:
        summary = json.loads((folder / "summary.json").read_text())
        summary["claims"] = [{"claim": HOSTILE, "verdict": HOSTILE, "against": {HOSTILE: HOSTILE}}]
        summary["command"] = HOSTILE
        (folder / "summary.json").write_text(json.dumps(summary))
        cells = pd.read_csv(folder / "cells.csv", keep_default_na=False)
        cells.assign(reason=cells["reason"] + HOSTILE).to_csv(folder / "cells.csv", index=False)
    html, md = text(folders, tmp_path)
    page = Page(html)
    assert {tag for tag, _ in page.tags} - {"br"} == {tag for tag, _ in Page(clean).tags} - {"br"}
    assert html.count("</style>") == 1 and html.count("<script") == html.count("</script") == 1
    assert not [attrs for _, attrs in page.tags if any(k.startswith("on") for k in attrs)]
    assert not any(mark in html + md for mark in "\x1b\u202e\u2066\u200b")

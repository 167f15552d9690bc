"""Recomputing judged tables from what was measured, and combining members of a grid."""

import json
import os
from functools import partial

import pandas as pd
import pytest

from attnres.commands import report as report_command
from attnres.commands.rejudge import main
from attnres.config import agreeing
from attnres.errors import ConfigError, DataError
from attnres.files import formats
from attnres.files.whole_files import MOST_BYTES, MOST_DEPTH
from attnres.interventions.config import GridConfig
from attnres.report.report import write_report
from attnres.statistics.rejudge import combine, judge_anew, recompute
from attnres.tables.folder import read_measured
from tests.statistics.probed_tables import measured, write_folder

# Which keys the members of one grid share, as the command says it.
AGREEING = partial(agreeing, GridConfig)
MOTIF = ("embedding", "mlp", "early")
TABLES = measured({("attnres", MOTIF): 0.3})


@pytest.fixture
def whole(tmp_path):
    return write_folder(tmp_path / "whole", *TABLES)


def member(tmp_path, *families, tables=TABLES, **changed):
    return write_folder(tmp_path / "-".join(families), *tables, families=families, **changed)


def test_recompute_reproduces_every_table_exactly(whole, capsys):
    judged, differing = recompute(read_measured(whole))
    assert differing == []
    for name, text in judged.texts().items():
        assert (whole / name).read_text() == text
    assert main([str(whole)]) == 0
    assert "reproduced exactly" in capsys.readouterr().out


def test_recompute_says_which_table_was_changed(whole, capsys):
    path = whole / "cells.csv"
    path.write_text(path.read_text().replace("causal", "negligible", 1))
    assert main([str(whole)]) == 5
    assert capsys.readouterr().out == "differ: cells.csv\n"


def test_recompute_refuses_what_was_not_preregistered(whole):
    effects = pd.read_parquet(whole / "effects.parquet")
    effects[effects["window"] != 100].to_parquet(whole / "effects.parquet")
    with pytest.raises(DataError, match="not of the windows that were preregistered"):
        read_measured(whole)
    effects.assign(cell=effects["cell"].str.replace("mask", "scale:0.5")).to_parquet(whole / "effects.parquet")
    with pytest.raises(DataError, match="which was not preregistered"):
        read_measured(whole)
    effects.to_parquet(whole / "effects.parquet")
    listed = pd.read_csv(whole / "eligibility.csv")
    listed.assign(eligible=True).to_csv(whole / "eligibility.csv", index=False)
    with pytest.raises(DataError, match="was excluded when it was preregistered"):
        read_measured(whole)


@pytest.mark.parametrize("name", ["summary.json", "preregistration.json"])
def test_rejudge_command_refuses_deep_and_huge_json_in_one_line(whole, capsys, name):
    (whole / name).write_text('{"a": ' + MOST_DEPTH * "[" + MOST_DEPTH * "]" + "}")
    assert main([str(whole)]) == 3
    os.truncate(whole / name, MOST_BYTES + 1)
    assert main([str(whole)]) == 3
    deep, huge = capsys.readouterr().err.splitlines()
    assert name in deep and f"nested deeper than {MOST_DEPTH}" in deep
    assert name in huge and f"at most {MOST_BYTES:,} are read" in huge


def test_recompute_refuses_a_summary_without_models(whole):
    (whole / "summary.json").write_text(json.dumps({formats.KEY: formats.PROBE_VERSION, "models": [{"kind": "wrap"}]}))
    with pytest.raises(DataError, match="does not name its models"):
        read_measured(whole)


@pytest.mark.parametrize("name", ["effects.parquet", "mass.parquet", "eligibility.csv", "attribution.parquet"])
def test_recompute_names_a_column_that_is_missing(whole, capsys, name):
    frame = pd.read_csv(whole / name) if name.endswith("csv") else pd.read_parquet(whole / "effects.parquet")
    if name.endswith("csv"):
        frame.drop(columns="eligible").to_csv(whole / name, index=False)
    else:
        frame.drop(columns="window").to_parquet(whole / name)
    assert main([str(whole)]) == 3
    missing = "eligible" if name.endswith("csv") else "window"
    assert f"{name} lacks the column '{missing}'" in capsys.readouterr().err


def test_recompute_judges_a_probe_anew(tmp_path, whole, capsys):
    told = (whole / "summary.json").read_text()
    summary = json.loads(told)
    summary["claims"], summary["models"][1]["training"] = [], {"trainable": "body"}
    (whole / "summary.json").write_text(json.dumps(summary))
    (whole / "motifs.csv").write_text("judged by another version")
    out = tmp_path / "anew"
    assert main([str(whole), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out / 'report.html'}\n"
    assert main([str(out)]) == 0
    anew = json.loads((out / "summary.json").read_text())
    assert anew["claims"] == json.loads(told)["claims"] and "rejudge" in anew["judged_anew"]["command"]
    assert anew["models"] == summary["models"]
    for name in ("effects.parquet", "mass.parquet", "eligibility.csv", "preregistration.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    assert "The verdicts are of a later version" in (out / "report.html").read_text()
    assert (whole / "motifs.csv").read_text() == "judged by another version"


def test_combine_of_members_is_the_whole_grid(tmp_path, whole):
    members = [member(tmp_path, "embedding", "older"), member(tmp_path, "older", "current", "recent")]
    alone = pd.read_csv(members[0] / "cells.csv")
    combine(members, tmp_path / "out", AGREEING)
    for name in ("cells", "contrasts", "motifs", "spearman", "dissociation"):
        both = [pd.read_csv(folder / f"{name}.csv") for folder in (whole, tmp_path / "out")]
        keys = [key for key in ("model", "baseline", "cell", "sublayer", "metric") if key in both[0]]
        both = [table.sort_values(keys, ignore_index=True) for table in both]
        pd.testing.assert_frame_equal(*both)
    joint = pd.read_csv(whole / "cells.csv").set_index(["model", "cell"])
    index = pd.MultiIndex.from_frame(alone[["model", "cell"]])
    # A member knows the size of the grid, but neither what else was excluded nor the other p.
    assert (alone["p_holm"].to_numpy() >= joint.loc[index, "p_holm"].to_numpy() - 1e-12)[alone["eligible"]].all()
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["grid"]["complete"] and summary["grid"]["run_cells"] == 24
    registered = json.loads((tmp_path / "out" / "preregistration.json").read_text())
    assert [found["folder"] for found in registered["parts"]] == [folder.name for folder in members]
    assert len(registered["cells"]) == 24
    assert recompute(read_measured(tmp_path / "out"))[1] == []


def test_estimates_from_gradients_are_kept_by_recompute_and_combine(tmp_path, whole):
    effects = TABLES[0][TABLES[0]["model"] == "attnres"]
    estimates = effects[["model", "cell", "window", "document", "split", "family"]].assign(estimate=effects["dnll"])
    estimates.to_parquet(whole / "attribution.parquet")
    judge_anew(read_measured(whole), tmp_path / "anew")
    assert (tmp_path / "anew" / "attribution.parquet").is_file()
    anew = json.loads((tmp_path / "anew" / "summary.json").read_text())
    assert anew["attribution_rank"]["rho"] == pytest.approx(1) and len(anew["attribution"]) == 23
    members = [member(tmp_path, "embedding", "older"), member(tmp_path, "older", "current", "recent")]
    for folder in members:
        families = json.loads((folder / "preregistration.json").read_text())["probe"]["families"]
        estimates[estimates["family"].isin(families)].to_parquet(folder / "attribution.parquet")
    combine(members, tmp_path / "out", AGREEING)
    joint = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert joint["attribution_rank"] == anew["attribution_rank"]
    assert "estimated to first order" in write_report(tmp_path / "out").read_text()


def test_a_folder_of_an_older_version_is_refused_and_judged_anew_by_the_command_that_is_named(whole, tmp_path, capsys):
    summary, cells = whole / "summary.json", whole / "cells.csv"
    plain = json.loads(summary.read_text())
    assert plain.pop(formats.KEY) == formats.PROBE_VERSION
    summary.write_text(json.dumps(plain))
    cells.write_text(cells.read_text().replace("negligible", "null"))
    for command in (main, report_command.main):
        assert command([str(whole)]) == 3
        (line,) = capsys.readouterr().err.splitlines()
        assert f"python -m attnres.commands.rejudge {whole} --out OUT" in line
    out = tmp_path / "anew"
    assert main([str(whole), "--out", str(out)]) == 0
    assert "null" not in (out / "cells.csv").read_text()
    assert recompute(read_measured(out))[1] == []
    assert (out / "preregistration.json").read_bytes() == (whole / "preregistration.json").read_bytes()


def test_combine_refuses_members_that_do_not_belong_together(tmp_path):
    first = member(tmp_path, "embedding")
    with pytest.raises(ConfigError, match="two or more different folders"):
        combine([first, first], tmp_path / "out", AGREEING)
    other = member(tmp_path, "older", hashes={"data": "abc", "checkpoint": "other"})
    with pytest.raises(ConfigError, match="their hashes"):
        combine([first, other], tmp_path / "out", AGREEING)
    longer = member(tmp_path, "current", probe={"families": ["current"], "length": 32, "seed": 0})
    with pytest.raises(ConfigError, match="their probe settings differ"):
        combine([first, longer], tmp_path / "out", AGREEING)
    effects, mass, eligibility = TABLES
    changed = effects.assign(dnll=effects["dnll"] + 0.001), mass, eligibility
    again = member(tmp_path, "embedding", "recent", tables=changed)
    with pytest.raises(DataError, match="members differ in the effects of attnres, mask:embedding"):
        combine([first, again], tmp_path / "out", AGREEING)
    assert not (tmp_path / "out").exists()


def test_recompute_command_asks_for_an_output(tmp_path, capsys):
    assert main([str(tmp_path / "a"), str(tmp_path / "b")]) == 2
    assert main([str(tmp_path / "a")]) == 2
    assert "no probe folder" in capsys.readouterr().err

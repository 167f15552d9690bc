"""The report of a probe, drawn from tables that no model made."""

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest

from attnres.commands import report as report_command
from attnres.errors import ConfigError, DataError
from attnres.files import formats
from attnres.files.whole_files import MOST_BYTES
from attnres.report import methods, report
from attnres.report import words as report_text
from attnres.report.tables import read_tables
from attnres.report.viewer import viewer_data
from attnres.tables import columns
from tests.tables.fake_folder import write_fake

# Of each table that a report reads, a column that it cannot do without.
REQUIRED = {
    columns.CELLS: "dnll_lo",
    columns.CONTRASTS: "diff",
    columns.ROUTING: "source",
    columns.EFFECTS: "cell",
    columns.MASS: "window",
}
ROOT = Path(report.__file__).parents[2]
HOSTILE = (
    "<script>alert(1)</script></style><img src=x onerror=alert(1)> [x](javascript:alert(1)) | `a` \x1b[31m \"'&"
    "\u202e\u2066\u200b<!--" + "w" * 300
)


class Page(HTMLParser):
    """The tags, attributes and text of a page, as a browser would see them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture(scope="module")
def tables_once(tmp_path_factory) -> Path:
    return write_fake(tmp_path_factory.mktemp("tables") / "run")


@pytest.fixture(scope="module")
def drawn(tables_once, tmp_path_factory) -> Path:
    folder = Path(shutil.copytree(tables_once, tmp_path_factory.mktemp("probe") / "run"))
    assert report.write_report(folder) == folder / "report.html"
    return folder


@pytest.fixture
def folder(tables_once, tmp_path) -> Path:
    return Path(shutil.copytree(tables_once, tmp_path / "run"))


@pytest.fixture
def render(monkeypatch):
    """Writes the report without figures, whose input is tested on its own, and returns page and Markdown."""
    monkeypatch.setattr(report, "draw", lambda entries, tables: {entry.section: [] for entry in entries})

    def inner(folder: Path) -> tuple[str, str]:
        report.write_report(folder)
        return tuple((folder / name).read_text(encoding="utf-8") for name in ("report.html", "report.md"))

    return inner


def change_summary(folder: Path, **entries) -> None:
    path = folder / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def change_table(folder: Path, name: str, change) -> None:
    path = folder / name
    if path.suffix == ".csv":
        change(pd.read_csv(path, keep_default_na=False)).to_csv(path, index=False)
    else:
        change(pd.read_parquet(path)).to_parquet(path)


def test_report_loads_nothing_from_elsewhere(drawn):
    html = (drawn / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert not page.all("link") and not page.all("iframe")
    assert all(a["src"].startswith("data:image/svg+xml;base64,") for a in page.all("img"))
    assert all(a["href"].startswith("#") for a in page.all("a"))
    assert "http:" not in html and "https:" not in html and "@import" not in html and "url(" not in html
    for image in page.all("img"):
        svg = base64.b64decode(image["src"].split(",", 1)[1]).decode()
        # Names of XML vocabularies are no addresses that a browser would open.
        addresses = set(re.findall(r"https?://[^\"'<> ]*", svg))
        assert addresses <= {
            "http://www.w3.org/2000/svg",
            "http://www.w3.org/1999/xlink",
            "http://purl.org/dc/elements/1.1/",
            "http://creativecommons.org/ns#",
            "http://www.w3.org/1999/02/22-rdf-syntax-ns#",
            "http://purl.org/dc/dcmitype/StillImage",
        }


def test_report_policy_allows_only_its_own_style_script_and_inline_images(drawn):
    html = (drawn / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL).group(1)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    script_digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.split("; ") == [
        "default-src 'none'",
        f"style-src 'sha256-{digest}'",
        f"script-src 'sha256-{script_digest}'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "require-trusted-types-for 'script'",
    ]
    assert html.index("Content-Security-Policy") < html.index("<style>") and page.all("script") == [{}]
    assert not [attrs for _, attrs in page.tags if "style" in attrs or any(k.startswith("on") for k in attrs)]


def test_report_sections_come_in_order_and_are_linked(drawn):
    page = Page((drawn / "report.html").read_text(encoding="utf-8"))
    expected = [
        "claims",
        "checks",
        "routing",
        "schedule",
        "effects",
        "mass",
        "forest",
        "contrasts",
        "motifs",
        "cells",
        "reading",
        "methods",
        "provenance",
    ]
    assert [a["id"] for a in page.all("h2")] == expected
    assert [a["href"] for a in page.all("a")] == [f"#{name}" for name in expected]


def test_report_figures_have_text_for_those_who_cannot_see_them(drawn):
    page = Page((drawn / "report.html").read_text(encoding="utf-8"))
    files = sorted((drawn / "figures").iterdir())
    # Per model: routing, effects, scatter; two schedules; one ranking; two forests.
    assert len(page.all("img")) == len(files) == 3 * 3 + 2 + 1 + 2
    assert all(len(a["alt"]) > 40 for a in page.all("img"))
    assert {f.suffix for f in files} == {".svg"} and not list(drawn.rglob(".tmp-*"))
    for file in files:
        assert not [e for e in ElementTree.parse(file).iter() if e.tag.endswith("}script")]


def test_report_shows_each_cell_and_why_some_are_excluded(drawn):
    cells = pd.read_csv(drawn / "cells.csv", keep_default_na=False)
    excluded = cells[~cells["eligible"]]
    html = (drawn / "report.html").read_text(encoding="utf-8")
    assert html.count('<tr class="out"') == len(excluded) == 14
    for row in excluded.to_dict("records"):
        assert re.search(rf"{re.escape(row['cell'])}</code>.*?excluded.*?{row['reason']}", html)
    lines = (drawn / "report.md").read_text(encoding="utf-8").splitlines()
    assert sum(" is excluded: the family exists in " in line for line in lines) == len(excluded)
    assert sum(line.startswith("| mask:") for line in lines) == len(cells) - len(excluded) + 38


def test_report_numbers_are_those_of_the_tables(drawn):
    cells = pd.read_csv(drawn / "cells.csv", keep_default_na=False)
    row = cells[cells["eligible"]].iloc[0].to_dict()
    low, mid, high = (f"{float(row[k]):+.3f}" for k in ("dnll_lo", "dnll", "dnll_hi"))
    html = (drawn / "report.html").read_text(encoding="utf-8")
    assert f'{mid} <span class="ci">[{low}, {high}]</span>' in html


@pytest.mark.slow
def test_report_command_redraws_the_same_bytes_in_another_process(folder):
    for name in ("cells.csv", "routing.csv"):
        change_table(folder, name, lambda t: t[t["model"] == "uniform"])
    change_table(folder, "contrasts.csv", lambda t: t.head(3))
    names = ["report.html", "report.md", "figures/effects-0-uniform.svg", "figures/contrasts.svg"]
    report.write_report(folder)
    before = {name: (folder / name).read_bytes() for name in names}
    for name in names:
        (folder / name).unlink()
    done = subprocess.run(
        [sys.executable, "-m", "attnres.commands.report", str(folder)],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": "7"},
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{folder / 'report.html'}\n"
    assert {name: (folder / name).read_bytes() for name in names} == before


def test_report_says_first_that_the_baselines_disagree(folder):
    tables = read_tables(folder)
    first = report_text.warnings(tables)[0]
    clashes = report_text.disagreements(tables.contrasts)
    assert clashes and first.startswith(f"The baselines disagree on {len(clashes)} of 19 cells")
    assert first.endswith("source convention: uniform.")
    models = [m | {"convention": "full"} if m["name"] == "attnres" else m for m in tables.summary["models"]]
    change_summary(folder, models=models)
    assert report_text.warnings(read_tables(folder))[0].endswith("source convention: none of these does.")
    change_table(folder, "contrasts.csv", lambda t: t.assign(verdict="equivalent"))
    tables = read_tables(folder)
    assert report_text.disagreements(tables.contrasts) == [] == report_text.warnings(tables)
    assert report_text.headline(tables)[0].startswith("attnres: 19 of 24 cells could be tested")


def test_report_undecided_contrasts_are_no_disagreement(folder):
    def change(table):
        undecided = table["baseline"] == "recency"
        return table.assign(verdict=undecided.map({True: "inconclusive", False: "trained larger"}))

    change_table(folder, "contrasts.csv", change)
    assert report_text.disagreements(read_tables(folder).contrasts) == []


def test_report_names_appreciable_mass_without_a_role(folder):
    def change(table):
        chosen = (table["model"] == "attnres") & (table["cell"] == "mask:older@mlp.late")
        return table.assign(appreciable=chosen, verdict=table["verdict"].mask(chosen, "negligible"))

    change_table(folder, "cells.csv", change)
    assert "Appreciable mass without a detectable role (negligible): older → late MLP." in report_text.headline(
        read_tables(folder)
    )


def test_report_of_part_of_the_grid_says_so(folder, render):
    assert "part of the grid" not in Page(render(folder)[0]).text
    change_table(folder, "cells.csv", lambda t: t[t["family"].isin(["embedding", "older"])])
    grid = {"candidate_cells": 24, "run_cells": 12, "complete": False, "families": ["embedding", "older"]}
    change_summary(folder, grid=grid)
    html, md = render(folder)
    for text in (Page(html).text, md):
        assert "12 of 24 candidate cells (families: embedding, older)" in text
        assert "Holm's correction is over the full preregistered grid" in text


def test_report_warns_of_unverified_checkpoints_failed_checks_and_unpaired_windows(folder, render):
    summary = json.loads((folder / "summary.json").read_text())
    summary["models"][0]["verified"] = False
    summary["checks"][0]["passed"] = False
    summary["models"][2]["training"] = {"init": {"digest": "other"}}
    summary["provenance"]["hashes"] = {"baseline": "base"}
    change_summary(folder, **summary)
    change_table(folder, "effects.parquet", lambda t: t[(t["model"] != "uniform") | (t["window"] > 3)])
    html, md = render(folder)
    for text in (Page(html).text, md):
        assert "The checkpoint of attnres (runs/small-1a2b3c4d/attnres) was loaded unverified" in text
        assert "1 check(s) failed: schedule (recency)" in text
        assert "uniform began from other weights than those of the vanilla baseline (other against base)" in text
        assert "not probed on the same windows" in text


def test_report_warns_of_earlier_probes_that_can_turn_a_verdict(folder, render):
    tables = read_tables(folder)

    def warned(*earlier_probes):
        texts = report_text.warnings(replace(tables, preregistration={"earlier_looks": [*earlier_probes]}))
        return "\n".join(text for text in texts if "earlier probe" in text)

    another = {"folder": "probe_b", "differs": {"margin": 0.02, "families": ["older"]}}
    assert warned({"folder": "probe_a", "differs": {"families": ["older"]}}, 3, {}) == ""
    assert "1 earlier probe(s) of this checkpoint" in warned(another) and "probe_b (margin=0.02)" in warned(another)
    plan = json.loads((folder / "preregistration.json").read_text())
    (folder / "preregistration.json").write_text(json.dumps(plan | {"earlier_looks": [another]}))
    assert warned(another) in Page(render(folder)[0]).text


def test_report_escapes_hostile_text_wherever_it_stands(folder, render):
    clean = Page(render(folder)[0])
    for name, poisoned in (
        ("cells.csv", ["model", "cell", "reason", "family", "band"]),
        ("contrasts.csv", ["baseline", "cell", "family", "band"]),
    ):
        change_table(folder, name, lambda t, names=poisoned: t.assign(**{c: t[c] + HOSTILE for c in names}))
    summary = json.loads((folder / "summary.json").read_text())
    rows = [row for entry in summary.values() if isinstance(entry, list) for row in entry]
    known = {*summary, *summary["statistics"], *(key for row in rows if isinstance(row, dict) for key in row)}

    def poison(value):
        if isinstance(value, dict):
            return {k if k in known else k + HOSTILE: poison(v) for k, v in value.items()}
        if isinstance(value, list):
            return [poison(v) for v in value]
        return value + HOSTILE if isinstance(value, str) else value

    for name in ("summary.json", "preregistration.json"):
        (folder / name).write_text(json.dumps(poison(json.loads((folder / name).read_text()))))
    html, md = render(folder)
    page = Page(html)
    assert {tag for tag, _ in page.tags} == {tag for tag, _ in clean.tags}
    assert html.count("</style>") == 1 and html.count("<script") == html.count("</script") == 1
    assert not any(mark in html for mark in "\x1b\u202e\u2066\u200b")
    assert all(a["href"].startswith("#") for a in page.all("a")) and not page.all("img")
    assert not [attrs for _, attrs in page.tags if any(k.startswith("on") for k in attrs)]
    assert page.text.count("<script>alert(1)</script>") > 100
    assert "\x1b" not in md and not re.search(r"(?<!\\)<script|(?<!\\)\]\(javascript", md)


def test_report_file_names_stay_in_the_folder_whatever_a_model_is_called(folder, monkeypatch):
    summary = json.loads((folder / "summary.json").read_text())
    for name in ("cells.csv", "routing.csv"):
        change_table(folder, name, lambda t: t[t["model"] == "attnres"].assign(model="../../x$\\frac$<b>"))
    change_table(folder, "contrasts.csv", lambda t: t.head(0))
    change_summary(folder, models=[summary["models"][0] | {"name": "../../x$\\frac$<b>"}])
    report.write_report(folder)
    assert sorted(f.name for f in (folder / "figures").iterdir()) == [
        "effects-0-x-frac-b.svg",
        "forest.svg",
        "ranks-0-x-frac-b.svg",
        "routing-0-x-frac-b.svg",
        "scatter-0-x-frac-b.svg",
    ]
    assert "No cell is eligible in the trained model and in a baseline" in (folder / "report.html").read_text()
    assert sorted(p.name for p in folder.parent.iterdir()) == ["run"]


def test_report_refuses_to_write_through_a_link(folder, tmp_path, render):
    outside = tmp_path / "elsewhere"
    outside.write_text("kept")
    (folder / "report.html").symlink_to(outside)
    with pytest.raises(ConfigError, match="link out of the probe folder"):
        report.write_report(folder)
    assert outside.read_text() == "kept"


def test_report_masks_secrets_of_provenance_and_preregistration_as_stored_files_do(folder, render):
    change_summary(folder, provenance={"env": {"WANDB_API_KEY": "hunter2", "hf_token": "hunter2"}, "tokens": 7})
    plan = json.loads((folder / "preregistration.json").read_text())
    secrets = {"source": "https://me:hunter2@example.org/x", "hub.token": "hunter2", "run": "x.py --token hunter2"}
    (folder / "preregistration.json").write_text(json.dumps(plan | secrets))
    html, md = render(folder)
    assert "hunter2" not in html + md and "***" in html and "<td>7</td>" in html
    assert "example.org/x" in html and "x.py --token ***" in html


def test_report_does_without_the_optional_parts_of_the_summary(folder, render):
    (folder / "summary.json").write_text(json.dumps({formats.KEY: formats.PROBE_VERSION}))
    html, _ = render(folder)
    assert "AttnRes probe" in html and "No claim was evaluated" in html and "0.005" in html


def test_report_shows_a_dash_where_the_summary_has_no_value(folder, render):
    rows = [{"sublayer": "attn", "largest_mass": None, "largest_effect": None, "verdict": "inconclusive"}]
    models = [{"name": "attnres", "path": None, "parameters": None, "val_loss": None}]
    change_summary(folder, dissociation=rows, models=models, recency=None)
    for text in render(folder):
        assert "largest mass is –, the largest effect –: inconclusive." in text and "None" not in text


@pytest.mark.parametrize(
    ("summary", "message"),
    [
        ({"claims": {}}, "'claims' is not a list"),
        ({"grid": [1]}, "'grid' is not a JSON object"),
        ({"checks": ["noop"]}, "an entry of 'checks' is not an object"),
        ({"statistics": {"margin": 0}}, "the margin is 0"),
    ],
)
def test_read_tables_names_what_is_wrong_in_the_summary(folder, summary, message):
    (folder / "summary.json").write_text(json.dumps({formats.KEY: formats.PROBE_VERSION} | summary))
    with pytest.raises(DataError, match=message):
        read_tables(folder)


@pytest.mark.parametrize(("name", "column"), [(t.name, column) for t, column in REQUIRED.items()])
def test_read_tables_names_a_missing_column(folder, name, column):
    change_table(folder, name, lambda t: t.drop(columns=column))
    with pytest.raises(DataError, match=f"{name} lacks the column '{column}'"):
        read_tables(folder)


def test_read_tables_names_a_column_of_the_wrong_type(folder):
    change_table(folder, "cells.csv", lambda t: t.assign(dnll="large"))
    with pytest.raises(DataError, match="cells.csv: column 'dnll' holds something that is not a number"):
        read_tables(folder)


@pytest.mark.parametrize(
    ("name", "column", "value"),
    [("cells.csv", "verdict", "causl"), ("contrasts.csv", "verdict", "larger"), ("effects.parquet", "split", "test")],
)
def test_report_command_names_a_word_that_no_table_knows(folder, capsys, name, column, value):
    change_table(folder, name, lambda t: t.assign(**{column: value}))
    assert report_command.main([str(folder)]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{name}: column '{column}' holds '{value}', none of" in line


@pytest.mark.parametrize("name", ["summary.json", "preregistration.json", "viewer.json"])
def test_report_command_refuses_deep_and_huge_json_in_one_line(folder, capsys, name):
    (folder / name).write_text('{"a": ' + "[" * 64 + "]" * 64 + "}")
    assert report_command.main([str(folder)]) == 3
    os.truncate(folder / name, MOST_BYTES + 1)
    assert report_command.main([str(folder)]) == 3
    deep, huge = capsys.readouterr().err.splitlines()
    assert name in deep and "nested deeper than 64" in deep
    assert name in huge and ("at most 33,554,432 are read" in huge or "more than 8000000 bytes" in huge)


@pytest.mark.parametrize("name", ["summary.json", "preregistration.json"])
def test_report_command_refuses_another_format_and_names_the_command_that_converts_it(folder, capsys, name):
    plain = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(plain | {"format": 3}))
    assert report_command.main([str(folder)]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{name}: format 3" in line and f"python -m attnres.commands.rejudge {folder} --out OUT" in line


def test_read_tables_keeps_a_model_called_na(folder):
    change_table(folder, "cells.csv", lambda t: t.assign(model="NA"))
    assert set(read_tables(folder).cells["model"]) == {"NA"}


@pytest.mark.parametrize("name", [*(table.name for table in REQUIRED), "summary.json", "preregistration.json"])
def test_report_command_names_a_missing_or_broken_file_in_one_line(folder, capsys, name):
    (folder / name).write_bytes(b"\x00")
    assert report_command.main([str(folder)]) == 3
    (folder / name).unlink()
    assert report_command.main([str(folder)]) == 3
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(name in line for line in lines) and "is missing" in lines[1]


def test_report_command_without_a_folder_exits_2(tmp_path, capsys):
    assert report_command.main([str(tmp_path / "none")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.00001234, "+1.2e−5"), (-0.04, "−0.0400"), (1.5, "+1.500"), (0.0, "0"), (float("nan"), "–"), (None, "–")],
)
def test_nats_is_signed_and_short(value, text):
    assert report_text.nats(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.00002, "<0.0001"), (0.0001, "0.0001"), (0.04567, "0.0457"), (1.0, "1"), (None, "–")]
)
def test_probability_claims_no_more_than_the_flips_can_show(value, text):
    assert report_text.probability(value) == text


def test_markdown_table_keeps_its_columns_whatever_the_text():
    table = report_text.markdown_table(["a", "b"], [["x|y", "1\n2"], ["\x1b[2J", "<b>"]])
    assert [len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()] == [3, 3, 3, 3]
    assert "\x1b" not in table


def test_report_without_viewer_data_has_no_viewer(folder, render):
    html, _ = render(folder)
    assert "viewer-holder" not in html.split("<script>")[0] and 'href="#viewer"' not in html


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"sequences": []},
        {"sequences": [{"document": "a", "tokens": ["x", "y"], "weights": [[1, 2, 3]]}]},
        {"sequences": [{"document": "a", "tokens": [7], "weights": [[1, 2]]}]},
        {"reads": [{"read": 0}]},
    ],
)
def test_report_names_viewer_data_that_no_probe_wrote(folder, change):
    read = {"read": 0, "layer": 0, "sublayer": "attn", "sources": ["a", "b"], "families": ["embedding", "current"]}
    sequence = {"document": "a", "tokens": ["x"], "weights": [[400, 600]]}
    good = {"format": 1, "model": "attnres", "reads": [read], "sequences": [sequence]}
    (folder / "viewer.json").write_text(json.dumps(good))
    assert '"tokens":["x"]' in viewer_data(folder)
    (folder / "viewer.json").write_text(json.dumps(good | change))
    with pytest.raises(DataError, match=r"viewer\.json is not what a probe writes .*: delete it"):
        viewer_data(folder)


def test_viewer_data_cannot_end_its_element_and_hides_nothing(folder):
    hostile = "</script><!--\u202e\u2028\x1b &amp;"
    read = {"read": 0, "layer": 0, "sublayer": hostile, "sources": [hostile], "families": [hostile]}
    sequence = {"document": hostile, "tokens": [hostile], "weights": [[1000]]}
    data = {"format": 1, "model": hostile, "reads": [read], "sequences": [sequence]}
    (folder / "viewer.json").write_text(json.dumps(data))
    text = str(viewer_data(folder))
    assert not set("<>&\u202e\u2028\x1b") & set(text)
    assert json.loads(text)["sequences"][0]["tokens"] == ["</script><!--⟨U+202E⟩⟨U+2028⟩⟨U+001B⟩·&amp;"]


def test_claims_have_a_column_for_each_baseline(folder, render):
    claims = [{"claim": "a", "verdict": "reproduced", "against": {"uniform": "not reproduced"}}, {"claim": "b"}]
    change_summary(folder, claims=claims)
    html, md = render(folder)
    assert "Against recency</th>" in html and "Against uniform</th>" in html
    assert re.search(r"\| a +\| reproduced +\| – +\| not reproduced +\|", md)


def test_claims_of_a_control_with_trained_routing_stand_apart(folder, render):
    rows = [
        {
            "claim": "a",
            "verdict": "reproduced",
            "against": {"recency": "reproduced"},
            "recurs": {"uniform": "negligible"},
        }
    ]
    models = json.loads((folder / "summary.json").read_text())["models"]
    for row in models:
        row["routing_trained"] = row["name"] != "recency"
    change_summary(folder, claims=rows, models=models)
    html, md = render(folder)
    assert "Also in uniform</th>" in html and "Against recency</th>" in html
    assert "also in uniform" in md and re.search(r"\| a +\| reproduced +\| reproduced +\| negligible +\|", md)
    # A model that learned to route may do as the trained one does: no disagreement between baselines.
    assert "The baselines disagree" not in md


def test_report_shows_motifs_and_what_stands_out_in_other_models(drawn):
    text = Page((drawn / "report.html").read_text(encoding="utf-8")).text
    md = (drawn / "report.md").read_text(encoding="utf-8")
    section = text[text.index("The trained model’s cells at bands") :]
    section = section[: section.index("All cells")]
    for shown in ("mask:embedding@mlp.early", "mask:older@attn.late", "mask:current@mlp.early", "uncontrolled"):
        assert shown in section and shown in md
    assert "mask:recent@mlp.early" not in section and "in 1 of" in section


def test_adjusted_p_says_which_correction_it_is():
    assert report_text.adjusted({"p_holm": 0.02, "p_fdr": 0.01}) == "0.02"
    assert report_text.adjusted({"p_holm": float("nan"), "p_fdr": 0.01}) == "0.01 (BH)"
    assert report_text.adjusted({"p_holm": float("nan")}) == "–"


def test_report_shows_what_a_rescue_takes_back_or_why_no_share_is_given(folder, render):
    cell = "mask:embedding@mlp.early+rescue:recent@mlp.mid"
    shares = {"recovered": 0.75, "recovered_lo": 0.7, "recovered_hi": 0.8, "reason": ""}
    row = {"model": "attnres", "cell": cell, "without": "mask:embedding@mlp.early", "dnll": 0.1, "dnll_without": 0.4}
    unknown = row | dict.fromkeys(shares, None) | {"model": "uniform", "reason": "the effect is not above zero"}
    change_summary(folder, rescues=[row | shares, unknown])
    for text in render(folder):
        assert "rescue:recent@mlp.mid" in text and "0.750" in text and "[" in text
        assert "the effect is not above zero" in text


def test_report_of_a_probe_in_looks_says_so_and_compares_windows_look_by_look(folder, render):
    """A model that was decided early has fewer windows than another one, and is paired all the same."""
    change_summary(folder, statistics={"margin": 0.005, "looks": [40, 64]})
    for name in ("effects.parquet", "mass.parquet"):
        table = pd.read_parquet(folder / name)
        later = (table["document"] >= 64) & (table["split"] == "confirm")
        table["look"] = np.where(later, 2, 1)
        table[~(later & (table["model"] == "uniform"))].to_parquet(folder / name)
    html, _ = render(folder)
    assert "not probed on the same windows" not in html and "looks at 40, 64" in html
    table = pd.read_parquet(folder / "effects.parquet")
    table[~((table["model"] == "uniform") & (table["document"] == 30))].to_parquet(folder / "effects.parquet")
    assert "not probed on the same windows" in render(folder)[0]


def paragraph(folder: Path) -> str:
    return " ".join(methods.of_probe(read_tables(folder)))


def test_report_ends_with_a_paragraph_of_methods(folder, render):
    html, text = render(folder)
    for shown, after in ((html, 'id="provenance"'), (text, "## Command")):
        assert "9,999 flips" in shown[shown.index("Methods, to paste") : shown.rindex(after)]


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"statistics": {"margin": 0.02}}, "within ±0.02 nat, and a one-sided test shows its KL to be below 0.02 nat"),
        ({"statistics": {"sign_flips": 1234}}, "with 1,234 flips"),
        ({"statistics": {"alpha": 0.125}}, "is at most 0.125, and inconclusive otherwise. Intervals are 87.5% BCa"),
        ({"statistics": {"bootstrap": 777}}, "from 777 resamples"),
        ({"statistics": {"power": 0.75}}, "at a power of 0.75"),
        ({"statistics": {"window_length": 96}}, "of 96 tokens each"),
        ({"statistics": {"seed": 3}}, "Seeds: 3 (statistics)"),
        (
            {"statistics": {"looks": [32, 64], "spending": "pocock"}},
            "read after 32, 64 documents, with the level spent",
        ),
        ({"models": [{"name": "attnres", "experiment": "small", "seed": 7}]}, "7 (training of small)"),
        ({"provenance": {"seeds": {"probe": 5}}}, "5 (probe)"),
        (
            {"provenance": {"versions": {"scipy": "1.17.9"}, "git": {"sha": "f" * 40}}},
            "(commit ffffffffffff), scipy 1.17.9",
        ),
        ({"preregistration": {"sha256": "abcdef" * 10}}, "(sha256 abcdefabcdef)"),
        ({"judged_anew": {"git": {"sha": "e" * 40}}}, "of a later version (commit eeeeeeeeeeee)"),
    ],
)
def test_a_value_of_the_summary_changes_the_paragraph(folder, entries, said):
    assert said not in paragraph(folder)
    statistics = json.loads((folder / "summary.json").read_text())["statistics"]
    change_summary(folder, **{k: statistics | v if k == "statistics" else v for k, v in entries.items()})
    assert said in paragraph(folder)


def test_documents_and_families_of_the_tables_are_in_the_paragraph(folder):
    assert "24 pilot documents (24 windows) and 64 confirmatory documents (64 windows)" in paragraph(folder)
    assert "by the method of Holm." in paragraph(folder)
    change_table(folder, "effects.parquet", lambda t: t[t["document"] < 80].assign(document=t["document"] // 2))
    change_table(folder, "cells.csv", lambda t: t.assign(family_size=[17 + (row % 3) for row in range(len(t))]))
    assert "12 pilot documents (24 windows) and 28 confirmatory documents (56 windows)" in paragraph(folder)
    assert "by the method of Holm over families of 17 to 19 (mask) tests." in paragraph(folder)
    change_table(folder, "cells.csv", lambda t: t.assign(p_fdr=0.2))
    assert "by the method of Benjamini and Hochberg over families of 17 to 19 (mask) tests." in paragraph(folder)


@pytest.mark.parametrize(
    "odd",
    [
        {"preregistration": [1]},
        {"provenance": {"seeds": "x", "versions": ["a"], "git": ["a"]}},
        {"provenance": {"seeds": {"a": [1], "b": {}}}},
        {"models": [{"kind": "wrap", "seed": [2]}]},
        {"statistics": {"alpha": "x", "sign_flips": True, "bootstrap": [1], "power": {}, "looks": "all"}},
    ],
)
def test_the_paragraph_takes_whatever_a_summary_holds(folder, odd):
    change_summary(folder, **odd)
    assert "Computed with attnres" in paragraph(folder)

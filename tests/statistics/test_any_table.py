"""Verdicts on somebody's table: the digits of a probe's cells, families, controls, power, and what p can resolve."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from attnres.errors import ConfigError, DataError
from attnres.statistics.any_table import component_table, families, smallest_p, unresolved
from attnres.statistics.config import StatisticsConfig
from attnres.statistics.rejudge import recompute
from attnres.tables import columns
from attnres.tables.folder import read_measured, write_table
from attnres.tables.foreign import read_foreign

RECORD = Path(__file__).parents[2] / "results" / "2026-11-26_small_replication" / "seed0" / "probe"
QUICK = StatisticsConfig(sign_flips=999, bootstrap=200)
# Column of a component -> column of a cell.
SAME = {
    **{f"effect{end}": f"dnll{end}" for end in ("", "_lo", "_hi")},
    **{f"second{end}": f"kl{end}" for end in ("", "_lo", "_hi")},
    **{f"second_{end}": f"kl_{end}" for end in ("upper_p", "lower_p", "lower_holm")},
    **{name: name for name in ("documents", "p", "p_holm", "tost_p", "verdict", "documents_needed", "family_size")},
    "rows": "windows",
}


@pytest.fixture
def written(tmp_path):
    """Reads a table that was written as text."""

    def inner(frame: pd.DataFrame, **named):
        frame.to_csv(tmp_path / "table.csv", index=False)
        return read_foreign(tmp_path / "table.csv", named)

    return inner


def drawn(means: dict[str, float], units=40, rows=1, spread=0.02, seed=0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    lines = [
        {"unit": f"d{unit}", "row": row, "component": name, "effect": mean + spread * rng.normal()}
        for name, mean in means.items()
        for unit in range(units)
        for row in range(rows)
    ]
    return pd.DataFrame(lines)


def same(ours: pd.Series, theirs: pd.Series) -> bool:
    return (
        ours.astype(object).where(ours.notna(), None).tolist()
        == theirs.astype(object).where(theirs.notna(), None).tolist()
    )


@pytest.fixture(scope="module")
def record():
    """The committed replication, judged again by this version on this machine: its cells and its motifs."""
    measured = read_measured(RECORD)
    judged, _ = recompute(measured)
    return measured.effects, judged.cells, judged.motifs


def confirmed(effects: pd.DataFrame) -> pd.DataFrame:
    rows = effects[effects["split"] == "confirm"].astype({"dnll": "float64", "kl": "float64"})
    return rows.assign(family=rows["model"] + " " + rows["intervention"])


@pytest.mark.slow
def test_the_record_comes_out_of_a_bare_table_to_the_last_digit(record, written):
    effects, cells, _ = record
    bare = confirmed(effects)[["document", "cell", "family", "dnll", "kl"]]
    # In another order, with names of its own: neither changes a digit.
    bare = bare.sample(frac=1, random_state=0).set_axis(["prompt", "head", "family", "delta", "kl"], axis=1)
    named = {"unit": ["prompt"], "component": ["head"], "group": ["family"], "effect": ["delta"]}
    ours = component_table(written(bare, **named), StatisticsConfig(margin=0.005))
    cells = cells[cells["eligible"]]
    cells = cells.assign(group=cells["model"] + " " + cells["intervention"])
    both = ours.merge(cells, left_on=["group", "component"], right_on=["group", "cell"], suffixes=("", "_cell"))
    assert len(both) == len(ours) == len(cells) == 111
    of_cell = {name: f"{other}_cell" if other in ours else other for name, other in SAME.items()}
    assert [name for name, other in of_cell.items() if not same(both[name], both[other])] == []


@pytest.mark.slow
def test_a_control_gives_what_a_motif_has_of_it(record, written):
    effects, cells, motifs = record
    rows = confirmed(effects)
    rows = rows[rows["model"] == "attnres"]
    mask, matched = (rows[rows["intervention"] == kind] for kind in ("mask", "matched"))
    place = ["family_", "sublayer", "band", "document"]
    mask, matched = (
        frame.drop(columns="family").assign(family_=frame["cell"].str.split(":").str[1]) for frame in (mask, matched)
    )
    joined = mask.merge(matched[[*place, "dnll"]].rename(columns={"dnll": "control"}), on=place, how="left")
    ours = component_table(written(joined[["document", "cell", "dnll", "control"]]), StatisticsConfig(margin=0.005))
    theirs = motifs[motifs["model"] == "attnres"]
    both = ours.merge(theirs, left_on="component", right_on="cell", suffixes=("", "_motif"))
    assert both["control_p"].notna().sum() == 3 and len(both) == 19
    for name in ("diff", "diff_lo", "diff_hi", "p", "p_holm"):
        assert same(both[f"control_{name}"], both[f"matched_{name}"]), name
    assert both["specificity"].tolist() == both["specificity_motif"].tolist()
    assert set(both["specificity"]) == {"shown", "not tested"}


def test_rows_of_a_unit_are_averaged_and_are_no_further_units(written):
    """Eight rows that share most of their variance: as units they would find what is not there."""
    rng = np.random.default_rng(4)
    shared = np.repeat(rng.normal(0.25, 1, size=12), 8)
    frame = drawn({"a": 0.0}, units=12, rows=8, spread=0.01).assign(effect=lambda f: f["effect"] + shared)
    by_unit = component_table(written(frame), QUICK).iloc[0]
    as_units = component_table(written(frame.assign(unit=frame["unit"] + "." + frame["row"].astype(str))), QUICK).iloc[
        0
    ]
    assert (by_unit["documents"], by_unit["rows"], as_units["documents"]) == (12, 96, 96)
    assert by_unit["effect"] == pytest.approx(as_units["effect"])
    assert as_units["p"] < 0.05 < by_unit["p"]


def test_order_of_rows_and_other_components_change_no_digit(written):
    frame = drawn({"a": 0.05, "b": 0.0}, rows=3)
    whole = component_table(written(frame), QUICK)
    shuffled = component_table(written(frame.sample(frac=1, random_state=1)), QUICK).sort_values("component")
    pd.testing.assert_frame_equal(whole, shuffled.reset_index(drop=True), check_exact=True)
    for component, row in (("a", whole[:1]), ("b", whole[1:])):
        alone = component_table(written(frame[frame["component"] == component]), QUICK, family_size=2)
        # Holm alone looks at the others.
        beside = row.reset_index(drop=True).drop(columns="p_holm")
        pd.testing.assert_frame_equal(beside, alone.drop(columns="p_holm"), check_exact=True)


def test_verdicts_are_those_that_were_planted(written):
    frame = drawn({"strong": 0.1, "nothing": 0.0, "close": 0.007}, units=60)
    table = component_table(written(frame), replace(QUICK, margin=0.02)).set_index("component")
    assert table["verdict"].to_dict() == {"strong": "causal", "nothing": "negligible", "close": "negligible"}
    strict = component_table(written(frame), QUICK).set_index("component")
    assert strict.loc["close", "verdict"] == "inconclusive" and strict.loc["close", "documents_needed"] > 60
    assert strict["documents_needed"].notna().sum() == (strict["verdict"] == "inconclusive").sum()


def test_a_second_metric_has_a_margin_of_its_own(written):
    frame = drawn({"a": 0.0}, units=60, spread=0.001).assign(second=lambda f: 3 + f["effect"])
    within = component_table(written(frame), QUICK, second_margin=4.0).iloc[0]
    beyond = component_table(written(frame), QUICK, second_margin=2.0).iloc[0]
    assert (within["verdict"], beyond["verdict"]) == ("negligible", "causal")
    assert within["second_upper_p"] < 0.05 < within["second_lower_p"] and beyond["second_lower_holm"] < 0.05
    assert within["second"] == beyond["second"] == pytest.approx(3, abs=0.01)


def test_each_group_has_a_holm_of_its_own(written):
    frame = pd.concat([drawn({"a": 0.01, "b": 0.0, "c": 0.0}).assign(group="x"), drawn({"a": 0.01}).assign(group="y")])
    table = component_table(written(frame), QUICK).set_index(["group", "component"])
    assert table["family_size"].tolist() == [3, 3, 3, 1]
    assert table.loc[("x", "a"), "p"] == table.loc[("y", "a"), "p"] == table.loc[("y", "a"), "p_holm"]
    assert table.loc[("x", "a"), "p_holm"] == 3 * table.loc[("x", "a"), "p"]
    planned = component_table(written(frame), QUICK, family_size=10).set_index(["group", "component"])
    assert planned.loc[("y", "a"), "p_holm"] == 10 * table.loc[("y", "a"), "p"]


def test_families_are_refused_that_are_smaller_than_the_table_or_finer_than_the_flips(written):
    table = written(drawn({"a": 0.0, "b": 0.0}))
    with pytest.raises(ConfigError, match="--family-size 1, but 2 components are in the table"):
        component_table(table, QUICK, family_size=1)
    with pytest.raises(ConfigError, match=r"sign_flips=999 cannot reach alpha=0\.05 .* set it to at least 1020"):
        component_table(table, QUICK, family_size=51)


@pytest.mark.parametrize("documents", [2, 5, 9, 12])
def test_smallest_p_is_what_the_largest_effect_reaches(written, documents):
    frame = drawn({"a": 1.0}, units=documents, spread=1e-6)
    row = component_table(written(frame), QUICK).iloc[0]
    assert row["p"] == row["smallest_p"] == smallest_p(documents, 999)


def test_too_few_documents_for_a_family_are_found(written):
    """Five documents give p = .0625 at best, however large the effect."""
    few = component_table(written(drawn({"a": 1.0}, units=5)), QUICK)
    assert len(unresolved(few, 0.05)) == 1 and few.loc[0, "verdict"] == "inconclusive"
    assert len(unresolved(component_table(written(drawn({"a": 1.0}, units=6)), QUICK), 0.05)) == 0


def test_detectable_is_found_with_the_power_that_is_asked_for(written):
    config = replace(QUICK, power=0.9)
    row = component_table(written(drawn({"a": 0.0}, units=64, spread=1.0)), config, family_size=8).iloc[0]
    # Normal theory against the t test, of which a sign-flip test is a near copy for normal values.
    spread = row["detectable"] * np.sqrt(64) / (stats.norm.isf(0.05 / 16) + stats.norm.isf(0.1))
    limit = stats.t.isf(0.05 / 16, 63)
    power = stats.nct.sf(limit, 63, row["detectable"] / spread * 8)
    assert power == pytest.approx(0.9, abs=0.03)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda f: f[f["unit"] == "d3"], r"one unit \(d3\), and statistics by unit need at least 2"),
        (lambda f: f.drop(index=f.index[45]), "component b has 0 rows of unit d5, another one has 1"),
        (lambda f: pd.concat([f, f.iloc[[3]].assign(row=1)]), "component b has 1 rows of unit d3, another one has 2"),
    ],
)
def test_components_on_other_units_are_one_line(written, change, line):
    table = written(change(drawn({"a": 0.0, "b": 0.0})))
    with pytest.raises(DataError, match=line):
        list(families(table))


def test_groups_may_have_units_of_their_own(written):
    frame = pd.concat([drawn({"a": 0.0}, units=9).assign(group="x"), drawn({"a": 0.0}, units=12).assign(group="y")])
    assert component_table(written(frame), QUICK)["documents"].tolist() == [9, 12]


def test_columns_are_those_that_tables_describe(written, tmp_path):
    frame = drawn({"a": 0.0}).assign(group="x", second=1.0, control=0.5)
    table = component_table(written(frame), QUICK)
    assert list(table) == columns.COMPONENTS.names
    write_table(tmp_path, columns.COMPONENTS, table)
    bare = component_table(written(frame[["unit", "component", "effect"]]), QUICK)
    assert not {"group", "second", "control_p", "specificity"} & set(bare)
    write_table(tmp_path, columns.COMPONENTS, bare)

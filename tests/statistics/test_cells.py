"""The table of cells: shape, verdicts in their order, families and their correction."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from attnres.errors import ConfigError
from attnres.statistics.config import StatisticsConfig
from attnres.tables.columns import CELLS
from tests.statistics.small_grid import (
    DOCUMENTS,
    ELIGIBLE,
    EXCLUDED,
    QUICK,
    SLICES,
    cells_of,
    flat,
    name,
    noise,
    random_tables,
    renamed,
    tables,
)

# Not inconclusive; corrected by Holm.
MAY_BE_EMPTY = ("documents_needed", "p_fdr", "kl_lower_fdr")


def verdicts(effects_by_cell, config=QUICK):
    effects, mass, eligibility = tables(effects_by_cell, models=("attnres",))
    table = cells_of(effects, mass, eligibility, config)
    return table.set_index("cell")


def test_cell_table_has_a_row_per_candidate_in_the_order_of_eligibility():
    effects, mass, eligibility = random_tables()
    table = cells_of(effects, mass, eligibility, QUICK)
    assert list(table.columns) == CELLS.names
    expected = eligibility[["model", "family", "sublayer", "band"]]
    pd.testing.assert_frame_equal(table[list(expected.columns)], expected)
    excluded = table[table["cell"] == name(EXCLUDED)]
    assert set(excluded["verdict"]) == {"excluded"}
    assert set(excluded["reason"]) == {"empty at every read of the band"}
    assert excluded[["dnll", "p", "p_holm", "mass", "documents_needed"]].isna().all(axis=None)
    assert not excluded["appreciable"].any()
    tested = table[table["eligible"]]
    assert not tested[[column for column in CELLS.names if column not in MAY_BE_EMPTY]].isna().any(axis=None)
    assert set(tested["documents"]) == {DOCUMENTS} and set(tested["windows"]) == {2 * DOCUMENTS}


def test_cell_table_equals_scipy_on_means_by_document():
    effects, mass, eligibility = random_tables()
    table = cells_of(effects, mass, eligibility, QUICK).set_index(["model", "cell"])
    mine = effects[(effects["model"] == "attnres") & (effects["cell"] == name(ELIGIBLE[2]))]
    dnll, kl = (mine.groupby("document")[column].mean().to_numpy() for column in ("dnll", "kl"))
    row = table.loc[("attnres", name(ELIGIBLE[2]))]
    assert row["dnll"] == pytest.approx(dnll.mean())
    assert row["kl"] == pytest.approx(kl.mean())
    assert row["flips"] == 0.25
    assert row["kl_lower_p"] >= stats.ttest_1samp(kl, 0.005, alternative="greater").pvalue
    assert row["kl_upper_p"] >= stats.ttest_1samp(kl, 0.005, alternative="less").pvalue
    interval = stats.bootstrap(
        (np.sort(dnll),), np.mean, n_resamples=100, method="BCa", rng=np.random.default_rng([0, 2])
    ).confidence_interval
    assert (row["dnll_lo"], row["dnll_hi"]) == pytest.approx((interval.low, interval.high), rel=1e-6)
    for model in ("attnres", "uniform"):
        rows = table.loc[model]
        rows = rows[rows["eligible"]]
        assert rows["p_holm"].to_numpy() == pytest.approx(multipletests(rows["p"], method="holm")[1])
        assert rows["kl_lower_holm"].to_numpy() == pytest.approx(multipletests(rows["kl_lower_p"], method="holm")[1])


def test_cell_table_weighs_documents_equally_however_many_windows_they_have():
    effects, mass, eligibility = tables({("attnres", piece): flat(0.0, 0.0) for piece in ELIGIBLE}, models=("attnres",))
    first = effects["document"] == 100
    effects["dnll"] = np.where(first, 1.0, 0.0)
    more = effects[first].assign(window=lambda rows: rows["window"] + 50_000)
    table = cells_of(pd.concat([effects, more]), mass, eligibility, QUICK)
    assert table.loc[table["eligible"], "dnll"].to_numpy() == pytest.approx(1 / DOCUMENTS)


def test_cell_table_of_no_effect_is_null_with_p_one():
    effects, mass, eligibility = tables({("attnres", piece): flat(0.0, 0.0) for piece in ELIGIBLE}, models=("attnres",))
    table = cells_of(effects.assign(dnll=0.0, kl=0.0), mass, eligibility, QUICK)
    table = table[table["eligible"]]
    assert (table[["p", "p_holm", "kl_lower_holm"]] == 1.0).all(axis=None)
    assert (table[["dnll", "dnll_lo", "dnll_hi", "kl", "kl_lo", "kl_hi", "tost_p", "kl_upper_p"]] == 0.0).all(axis=None)
    assert set(table["verdict"]) == {"negligible"}


def test_cell_table_verdicts_and_their_order():
    tiny_but_sure, small_and_vague, kl_alone, large = ELIGIBLE[:4]
    table = verdicts(
        {
            ("attnres", tiny_but_sure): flat(0.001, 0.0001, 0.0005, seed=1),
            ("attnres", small_and_vague): flat(0.003, 0.001, 0.03, seed=2),
            ("attnres", kl_alone): (0.02 * noise(3), 0.02 + 0.002 * noise(4)),
            ("attnres", large): flat(0.1, 0.02, 0.05, seed=5),
            # dNLL passes the margin, KL does not: no evidence of no effect, and none of one.
            ("attnres", ELIGIBLE[4]): (0.0005 * noise(6), 0.005 + 0.001 * noise(7)),
        }
    )
    assert table.loc[name(tiny_but_sure), "p_holm"] <= 0.05
    assert table.loc[name(tiny_but_sure), "verdict"] == "negligible"
    assert table.loc[name(small_and_vague), "verdict"] == "inconclusive"
    assert table.loc[name(kl_alone), "p_holm"] > 0.05
    assert table.loc[name(kl_alone), "verdict"] == "causal"
    assert table.loc[name(large), "verdict"] == "causal"
    assert table.loc[name(ELIGIBLE[4]), "tost_p"] <= 0.05
    assert table.loc[name(ELIGIBLE[4]), "verdict"] == "inconclusive"
    assert table.loc[name(EXCLUDED), "verdict"] == "excluded"
    inconclusive = table["verdict"] == "inconclusive"
    assert table.loc[inconclusive & (table.index != name(ELIGIBLE[4])), "documents_needed"].gt(DOCUMENTS).all()
    assert table.loc[~inconclusive, "documents_needed"].isna().all()


def test_cell_table_judges_mass_against_its_uniform_share():
    effects, mass, eligibility = random_tables()
    table = cells_of(effects, mass, eligibility, QUICK).set_index(["model", "cell"]).loc["attnres"]
    # Masses are 0.2, 0.3, ... by position among the slices, all with a uniform share of 0.35.
    position = [SLICES.index(piece) for piece in ELIGIBLE]
    rows = table.loc[[name(piece) for piece in ELIGIBLE]]
    assert rows["mass"].to_numpy() == pytest.approx(0.2 + 0.1 * np.array(position))
    assert rows["uniform_excess"].to_numpy() == pytest.approx(rows["mass"] - 0.35)
    assert rows["appreciable"].tolist() == [place >= 2 for place in position]
    assert rows["norm_share"].to_numpy() == pytest.approx(rows["mass"] / 2)
    assert rows["displacement"].to_numpy() == pytest.approx(rows["mass"] * 3)
    rounding = mass.assign(mass=mass["uniform_share"] + 3e-8)
    assert not cells_of(effects, rounding, eligibility, QUICK)["appreciable"].any()


def test_cell_table_corrects_part_of_a_grid_over_the_whole():
    effects, mass, eligibility = random_tables()
    whole = cells_of(effects, mass, eligibility, QUICK).set_index(["model", "cell"])
    some = [name(piece) for piece in ELIGIBLE if piece[0] == "current"]
    run = effects[effects["cell"].isin(some)]
    part_listed = eligibility[eligibility["family"] == "current"]
    for listed, candidates in ((eligibility, None), (eligibility, 6), (part_listed, 6)):
        config = StatisticsConfig(sign_flips=999, bootstrap=100, grid_cells=candidates)
        part = cells_of(run, mass, listed, config).set_index(["model", "cell"])
        tested = part[part["eligible"]]
        assert set(tested.index.get_level_values("cell")) == set(some)
        reference = whole.loc[tested.index]
        for column in ("dnll", "p", "dnll_lo", "dnll_hi", "kl_hi", "tost_p", "kl_upper_p", "mass_lo"):
            np.testing.assert_array_equal(tested[column], reference[column])
        assert (tested["p_holm"] >= reference["p_holm"] - 1e-12).all()
        size = 6 - int((~listed["eligible"]).sum() / 2)
        by_hand = np.minimum(tested.loc["attnres", "p"].min() * size, 1.0)
        assert tested.loc["attnres", "p_holm"].min() == pytest.approx(by_hand)


def test_cell_table_corrects_each_intervention_over_its_own_grid():
    effects, mass, eligibility = random_tables()
    more, listed = renamed((effects, eligibility), "scale:0.5")
    both = cells_of(pd.concat([effects, more]), mass, pd.concat([eligibility, listed]), QUICK)
    alone = cells_of(effects, mass, eligibility, QUICK)
    assert len(both) == 2 * len(alone) and "scale:0.5:older@mlp.early" in set(both["cell"])
    of_mask = both[both["intervention"] == "mask"].reset_index(drop=True)
    pd.testing.assert_frame_equal(of_mask, alone)
    assert set(alone["family_size"].dropna()) == {5}


def test_cell_table_corrects_maps_by_benjamini_hochberg():
    effects, mass, eligibility = random_tables()
    layers = {"early": "layer0", "late": "layer5"}
    more, listed = renamed((effects, eligibility), "mask", layers)
    masses = pd.concat([mass, mass.assign(band=mass["band"].map(layers))])
    table = cells_of(pd.concat([effects, more]), masses, pd.concat([eligibility, listed]), QUICK)
    of_bands, of_layers = (
        table[table["band"].str.startswith("layer") == flag].reset_index(drop=True) for flag in (0, 1)
    )
    alone = cells_of(effects, mass, eligibility, QUICK)
    pd.testing.assert_frame_equal(of_bands, alone)
    assert set(of_layers["correction"]) == {"fdr_bh", ""} and of_layers["p_holm"].isna().all()
    for _, rows in of_layers[of_layers["eligible"]].groupby("model"):
        assert rows["p_fdr"].to_numpy() == pytest.approx(multipletests(rows["p"], method="fdr_bh")[1])
        causal = (rows["p_fdr"] <= 0.05) | (rows["kl_lower_fdr"] <= 0.05)
        assert (causal >= (rows["verdict"] == "causal")).all()


def test_cell_table_where_all_is_excluded():
    effects, mass, eligibility = random_tables()
    table = cells_of(effects.iloc[:0], mass, eligibility.assign(eligible=False), QUICK)
    assert set(table["verdict"]) == {"excluded"} and len(table) == len(eligibility)
    assert list(table.columns) == CELLS.names


def test_cell_table_refuses_a_grid_smaller_than_what_was_tested():
    data = random_tables()
    with pytest.raises(ConfigError, match="grid_cells=5, but 6 candidates are listed"):
        cells_of(*data, StatisticsConfig(sign_flips=999, grid_cells=5))

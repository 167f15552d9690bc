"""Dissociation of mass and effect: its three outcomes, level and power, and the rank correlations beside
it."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from attnres.statistics.config import StatisticsConfig
from attnres.statistics.design import Design
from attnres.statistics.dissociation import dissociation_table
from attnres.statistics.rank_correlation import spearman_table

QUICK = StatisticsConfig(sign_flips=999, bootstrap=200)
CELLS = [(family, band) for family in ("embedding", "current") for band in ("early", "late")]


def tables(mass, effect, pilot=None, noise=0.01, documents=30, seed=0, sublayers=("attn", "mlp"), metrics=None):
    """Tables whose cells have these means of mass and dnll in both splits, or `pilot` = (mass, effect) in the
    pilot one."""
    rng = np.random.default_rng(seed)
    effects, masses, eligibility = [], [], []
    for sublayer in sublayers:
        for place, (family, band) in enumerate(CELLS[: len(mass)]):
            where = {"model": "attnres", "family": family, "sublayer": sublayer, "band": band}
            cell = {"cell": f"mask:{family}@{sublayer}.{band}", "intervention": "mask"}
            eligibility.append(
                where | cell | {"eligible": True, "reason": "", "eligible_reads": 2, "reads": 2, "mean_sources": 4.0}
            )
            for split, first in (("pilot", 0), ("confirm", 1000)):
                means = (mass, effect) if split == "confirm" or pilot is None else pilot
                number = np.arange(documents) + first
                rows = where | {"document": number, "window": number * 10, "split": split}
                values = {"dnll": means[1][place] + noise * rng.normal(size=documents), "kl": 0.0, "flips": 0.0}
                effects.append(pd.DataFrame(rows | cell | values))
                shares = {"mass": means[0][place] + noise * rng.normal(size=documents), "uniform_share": 0.25}
                for metric in ("norm_share", "displacement"):
                    centre = (metrics or {}).get(metric, [0.0] * len(mass))[place]
                    shares[metric] = centre + noise * rng.normal(size=documents)
                masses.append(pd.DataFrame(rows | shares))
    return (pd.concat(effects, ignore_index=True), pd.concat(masses, ignore_index=True), pd.DataFrame(eligibility))


def spearman_of(effects, mass, eligibility, config):
    return spearman_table(Design.of(effects, mass, eligibility), config)


def dissociation_of(effects, mass, eligibility, config):
    design = Design.of(effects, mass, eligibility)
    return dissociation_table(design, spearman_table(design, config), config)


def test_dissociation_coincides_where_one_cell_leads_both():
    table = dissociation_of(*tables([0.1, 0.5, 0.2, 0.2], [0.0, 0.4, 0.1, 0.1]), QUICK)
    assert table["verdict"].tolist() == ["coincide", "coincide"]
    assert (
        table["mass_cell"].tolist()
        == table["effect_cell"].tolist()
        == ["mask:embedding@attn.late", "mask:embedding@mlp.late"]
    )
    assert table["p"].isna().all()


def test_dissociation_is_shown_on_the_confirmatory_split():
    table = dissociation_of(*tables([0.1, 0.5, 0.2, 0.2], [0.0, 0.1, 0.4, 0.1]), QUICK)
    assert table["verdict"].tolist() == ["dissociated", "dissociated"]
    assert table["mass_cell"].tolist() == ["mask:embedding@attn.late", "mask:embedding@mlp.late"]
    assert table["effect_cell"].tolist() == ["mask:current@attn.early", "mask:current@mlp.early"]
    assert table["mass_diff"].to_numpy() == pytest.approx(0.3, abs=0.02)
    assert table["effect_diff"].to_numpy() == pytest.approx(0.3, abs=0.02)
    assert (table["p"] == 0.001).all() and (table["p_holm"] == 0.002).all()
    assert (table["mass_diff_lo"] < table["mass_diff"]).all() and (table["mass_diff"] < table["mass_diff_hi"]).all()


@pytest.mark.parametrize(
    ("mass", "effect"),
    [
        ([0.5, 0.2, 0.1], [0.1, 0.1, 0.1]),  # effects do not differ on the confirmatory split
        ([0.2, 0.2, 0.1], [0.1, 0.4, 0.1]),  # masses do not
        ([0.2, 0.5, 0.1], [0.1, 0.4, 0.1]),  # mass is the other way round
    ],
)
def test_dissociation_needs_both_differences_on_the_confirmatory_split(mass, effect):
    pilot = [0.5, 0.2, 0.1], [0.1, 0.4, 0.1]
    table = dissociation_of(*tables(mass, effect, pilot=pilot), QUICK)
    assert table["verdict"].tolist() == ["inconclusive", "inconclusive"]
    assert table["mass_cell"].str.startswith("mask:embedding").all()
    assert (table["mass_cell"] != table["effect_cell"]).all() and table["p"].notna().all()


def test_dissociation_corrects_over_both_sublayers_even_if_one_was_run():
    table = dissociation_of(*tables([0.5, 0.2], [0.1, 0.4], sublayers=("mlp",)), QUICK)
    assert table["p_holm"].tolist() == (2 * table["p"]).tolist()


def test_dissociation_does_not_rest_on_rounding():
    """Uniform routing: masses equal up to fp32 rounding are one mass, whichever the largest happens to be."""
    masses = [0.25 + 3e-8, 0.25 + 1e-8, 0.25, 0.25]
    table = dissociation_of(*tables(masses, [0.0, 0.0, 0.4, 0.0], noise=1e-9), QUICK)
    assert table["verdict"].tolist() == ["coincide", "coincide"]
    no_effect = dissociation_of(*tables([0.5, 0.2], [1e-9, 0.0], noise=1e-10), QUICK)
    assert no_effect["verdict"].tolist() == ["inconclusive", "inconclusive"]
    assert no_effect["reason"].str.contains("no cell has a positive effect").all()


def test_dissociation_says_why_nothing_was_tested():
    effects, mass, eligibility = tables([0.5, 0.2], [0.1, 0.4])
    confirm = effects["split"] == "confirm", mass["split"] == "confirm"
    without_pilot = dissociation_of(effects[confirm[0]], mass[confirm[1]], eligibility, QUICK)
    assert without_pilot["verdict"].tolist() == ["inconclusive"] * 2
    assert without_pilot["reason"].str.contains("pilot").all()
    one_cell = dissociation_of(*tables([0.5], [0.1]), QUICK)
    assert one_cell["reason"].tolist() == ["fewer than two eligible cells"] * 2


def test_dissociation_refuses_a_document_in_both_splits():
    effects, mass, eligibility = tables([0.5, 0.2], [0.1, 0.4])
    effects["document"] %= 1000
    with pytest.raises(ValueError, match="document 0 is in both"):
        dissociation_of(effects, mass, eligibility, QUICK)


def test_dissociation_refuses_effects_and_mass_of_other_documents():
    effects, mass, eligibility = tables([0.5, 0.2], [0.1, 0.4])
    with pytest.raises(ValueError, match="different documents"):
        dissociation_of(effects, mass[mass["document"] != 3], eligibility, QUICK)


def test_dissociation_holds_level_where_effects_do_not_differ():
    """All cells equal in truth: the pilot's pick is chance, and the confirmatory split must not confirm
    it."""
    replicates = 40
    drawn = [tables([0.5, 0.2, 0.2], [0.1] * 3, documents=12, seed=seed) for seed in range(replicates)]
    effects, mass, eligibility = (
        pd.concat([tables[table].assign(model=f"replicate {seed}") for seed, tables in enumerate(drawn)])
        for table in range(3)
    )
    verdicts = dissociation_of(effects, mass, eligibility, StatisticsConfig(sign_flips=999, bootstrap=100))["verdict"]
    assert len(verdicts) == 2 * replicates
    assert (verdicts == "dissociated").sum() <= stats.binom.ppf(0.999, 2 * replicates, 0.05)
    assert (verdicts == "inconclusive").sum() > replicates  # two picks in three are not the cell of largest mass


def test_spearman_equals_scipy_on_means_by_document():
    effects, mass, eligibility = tables([0.1, 0.5, 0.2, 0.3], [0.0, 0.1, 0.4, 0.1], noise=0.2)
    table = spearman_of(effects, mass, eligibility, QUICK).set_index(["sublayer", "metric"])
    assert list(table.index.get_level_values("sublayer").unique()) == ["attn", "mlp", "all"]
    key = ["sublayer", "family", "band"]
    effect = effects[effects["split"] == "confirm"].groupby(key)["dnll"].mean()
    for metric in ("mass", "norm_share", "displacement"):
        other = mass[mass["split"] == "confirm"].groupby(key)[metric].mean()
        assert table.loc[("all", metric), "rho"] == pytest.approx(stats.spearmanr(effect, other).statistic)
        expected = stats.spearmanr(effect["mlp"], other["mlp"]).statistic
        assert table.loc[("mlp", metric), "rho"] == pytest.approx(expected)
    assert (table["rho_lo"] <= table["rho_hi"]).all()
    assert table.loc["all", "cells"].tolist() == [8] * 3


def test_spearman_names_the_metric_that_predicts_effect():
    """Mass on a short vector: mass runs against effect, the norm-aware share with it."""
    effect = [0.1, 0.2, 0.3, 0.4]
    data = tables([0.4, 0.3, 0.2, 0.1], effect, metrics={"norm_share": effect})
    table = spearman_of(*data, QUICK).set_index(["sublayer", "metric"])
    assert table.loc[("mlp", "mass"), "rho"] == -1.0 and not table.loc[("mlp", "mass"), "predicts"]
    assert table.loc[("mlp", "norm_share"), "rho"] == 1.0 and table.loc[("mlp", "norm_share"), "predicts"]
    assert not table.loc[("mlp", "displacement"), "predicts"]
    dissociation = dissociation_of(*data, QUICK)
    assert dissociation["predicted_by"].tolist() == ["norm_share", "norm_share"]
    assert dissociation["verdict"].tolist() == ["dissociated", "dissociated"]


def test_spearman_is_undefined_where_nothing_varies_or_cells_are_few():
    two = spearman_of(*tables([0.5, 0.2], [0.1, 0.4]), QUICK)
    assert two.loc[two["sublayer"] == "mlp", "rho"].isna().all()
    flat = spearman_of(*tables([0.25] * 4, [0.1, 0.2, 0.3, 0.4], noise=1e-10), QUICK)
    assert flat.loc[flat["metric"] == "mass", ["rho", "rho_lo", "rho_hi"]].isna().all(axis=None)
    assert not flat.loc[flat["metric"] == "mass", "predicts"].any()


def test_spearman_and_dissociation_ignore_row_order_and_document_numbers():
    effects, mass, eligibility = tables([0.1, 0.5, 0.2, 0.3], [0.0, 0.1, 0.4, 0.1], noise=0.3)
    rng = np.random.default_rng(0)
    numbers = dict(zip(effects["document"].unique(), rng.permutation(5000)[:60], strict=True))
    shuffled = [
        table.assign(document=table["document"].map(numbers)).sample(frac=1, random_state=1)
        for table in (effects, mass)
    ]
    for function in (spearman_of, dissociation_of):
        expected = function(effects, mass, eligibility, QUICK)
        pd.testing.assert_frame_equal(function(*shuffled, eligibility, QUICK), expected, rtol=1e-12)

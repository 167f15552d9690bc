"""Tables of cells and contrasts: shape, verdicts in their order, the Holm family, invariances, refusals."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.multitest import multipletests

from attnres.errors import ConfigError, DataError, NumericsError
from attnres.statistics.cells import CELL_COLUMNS, CONTRAST_COLUMNS, cell_table, contrast_table
from attnres.statistics.config import StatisticsConfig

# Not inconclusive; corrected by Holm.
MAY_BE_EMPTY = ("documents_needed", "p_fdr", "kl_lower_fdr")
QUICK = StatisticsConfig(sign_flips=999, bootstrap=100)
SLICES = [(family, "mlp", band) for family in ("embedding", "current", "older") for band in ("early", "late")]
EXCLUDED = ("older", "mlp", "early")
ELIGIBLE = [piece for piece in SLICES if piece != EXCLUDED]
DOCUMENTS = 40


def noise(seed: int, documents: int = DOCUMENTS) -> np.ndarray:
    """Mean 0 and standard deviation 1 exactly, symmetric: what is tested on it can be computed by hand."""
    half = np.random.default_rng(seed).normal(size=documents // 2)
    column = np.concatenate([half, -half])
    return column / column.std(ddof=1)


def name(piece) -> str:
    return "mask:{}@{}.{}".format(*piece)


def tables(effects_by_cell, models=("attnres", "uniform"), windows=2, documents=DOCUMENTS):
    """Effects, mass and eligibility; `effects_by_cell[model, slice]` = (dnll [documents], kl [documents])."""
    document = np.repeat(np.arange(documents) + 100, windows)
    window = np.arange(documents * windows) + 1000
    within = np.tile(np.linspace(-1, 1, windows), documents) * 0.003  # averages out within a document
    effects, mass, eligibility = [], [], []
    for model in models:
        for position, piece in enumerate(SLICES):
            where = dict(zip(("family", "sublayer", "band"), piece, strict=True)) | {"model": model}
            eligible = piece != EXCLUDED
            reason = "" if eligible else "empty at every read of the band"
            eligibility.append(
                where
                | {
                    "intervention": "mask",
                    "cell": name(piece),
                    "eligible": eligible,
                    "reason": reason,
                    "eligible_reads": 3 * eligible,
                    "reads": 3,
                    "mean_sources": 3.5,
                }
            )
            rows = where | {"window": window, "document": document, "split": "confirm"}
            if eligible:
                weight = 0.2 + 0.1 * position + 0.01 * noise(90 + position, documents).repeat(windows)
                shares = {"uniform_share": 0.35, "norm_share": weight / 2, "displacement": weight * 3}
                mass.append(pd.DataFrame(rows | {"mass": weight} | shares))
            if (model, piece) in effects_by_cell:
                dnll, kl = (values.repeat(windows) + within for values in effects_by_cell[model, piece])
                measured = {
                    "cell": name(piece),
                    "intervention": "mask",
                    "dnll": dnll,
                    "kl": kl,
                    "flips": 0.25,
                }
                effects.append(pd.DataFrame(rows | measured))
    return (
        pd.concat(effects, ignore_index=True),
        pd.concat(mass, ignore_index=True),
        pd.DataFrame(eligibility),
    )


def flat(dnll: float, kl: float, deviation: float = 0.0, seed: int = 0, documents: int = DOCUMENTS):
    return dnll + deviation * noise(seed, documents), np.full(documents, kl)


def random_tables(seed: int = 0, **options):
    rng = np.random.default_rng(seed)
    cells = {
        (model, piece): (rng.normal(0.002, 0.01, DOCUMENTS), rng.gamma(1.0, 0.003, DOCUMENTS))
        for model in ("attnres", "uniform")
        for piece in ELIGIBLE
    }
    return tables(cells, **options)


def verdicts(effects_by_cell, config=QUICK):
    effects, mass, eligibility = tables(effects_by_cell, models=("attnres",))
    table = cell_table(effects, mass, eligibility, config)
    return table.set_index("cell")


def test_cell_table_has_a_row_per_candidate_in_the_order_of_eligibility():
    effects, mass, eligibility = random_tables()
    table = cell_table(effects, mass, eligibility, QUICK)
    assert list(table.columns) == CELL_COLUMNS
    expected = eligibility[["model", "family", "sublayer", "band"]]
    pd.testing.assert_frame_equal(table[list(expected.columns)], expected)
    excluded = table[table["cell"] == name(EXCLUDED)]
    assert set(excluded["verdict"]) == {"excluded"}
    assert set(excluded["reason"]) == {"empty at every read of the band"}
    assert excluded[["dnll", "p", "p_holm", "mass", "documents_needed"]].isna().all(axis=None)
    assert not excluded["appreciable"].any()
    tested = table[table["eligible"]]
    assert not tested[[column for column in CELL_COLUMNS if column not in MAY_BE_EMPTY]].isna().any(axis=None)
    assert set(tested["documents"]) == {DOCUMENTS} and set(tested["windows"]) == {2 * DOCUMENTS}


def test_cell_table_equals_scipy_on_means_by_document():
    effects, mass, eligibility = random_tables()
    table = cell_table(effects, mass, eligibility, QUICK).set_index(["model", "cell"])
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
    table = cell_table(pd.concat([effects, more]), mass, eligibility, QUICK)
    assert table.loc[table["eligible"], "dnll"].to_numpy() == pytest.approx(1 / DOCUMENTS)


def test_cell_table_of_no_effect_is_null_with_p_one():
    effects, mass, eligibility = tables({("attnres", piece): flat(0.0, 0.0) for piece in ELIGIBLE}, models=("attnres",))
    table = cell_table(effects.assign(dnll=0.0, kl=0.0), mass, eligibility, QUICK)
    table = table[table["eligible"]]
    assert (table[["p", "p_holm", "kl_lower_holm"]] == 1.0).all(axis=None)
    assert (table[["dnll", "dnll_lo", "dnll_hi", "kl", "kl_lo", "kl_hi", "tost_p", "kl_upper_p"]] == 0.0).all(axis=None)
    assert set(table["verdict"]) == {"null"}


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
    assert table.loc[name(tiny_but_sure), "verdict"] == "null"
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
    table = cell_table(effects, mass, eligibility, QUICK).set_index(["model", "cell"]).loc["attnres"]
    # Masses are 0.2, 0.3, ... by position among the slices, all with a uniform share of 0.35.
    position = [SLICES.index(piece) for piece in ELIGIBLE]
    rows = table.loc[[name(piece) for piece in ELIGIBLE]]
    assert rows["mass"].to_numpy() == pytest.approx(0.2 + 0.1 * np.array(position))
    assert rows["uniform_excess"].to_numpy() == pytest.approx(rows["mass"] - 0.35)
    assert rows["appreciable"].tolist() == [place >= 2 for place in position]
    assert rows["norm_share"].to_numpy() == pytest.approx(rows["mass"] / 2)
    assert rows["displacement"].to_numpy() == pytest.approx(rows["mass"] * 3)
    rounding = mass.assign(mass=mass["uniform_share"] + 3e-8)
    assert not cell_table(effects, rounding, eligibility, QUICK)["appreciable"].any()


def test_cell_table_corrects_part_of_a_grid_over_the_whole():
    effects, mass, eligibility = random_tables()
    whole = cell_table(effects, mass, eligibility, QUICK).set_index(["model", "cell"])
    some = [name(piece) for piece in ELIGIBLE if piece[0] == "current"]
    run = effects[effects["cell"].isin(some)]
    part_listed = eligibility[eligibility["family"] == "current"]
    for listed, candidates in ((eligibility, None), (eligibility, 6), (part_listed, 6)):
        config = StatisticsConfig(sign_flips=999, bootstrap=100, grid_cells=candidates)
        part = cell_table(run, mass, listed, config).set_index(["model", "cell"])
        tested = part[part["eligible"]]
        assert set(tested.index.get_level_values("cell")) == set(some)
        reference = whole.loc[tested.index]
        for column in ("dnll", "p", "dnll_lo", "dnll_hi", "kl_hi", "tost_p", "kl_upper_p", "mass_lo"):
            np.testing.assert_array_equal(tested[column], reference[column])
        assert (tested["p_holm"] >= reference["p_holm"] - 1e-12).all()
        size = 6 - int((~listed["eligible"]).sum() / 2)
        by_hand = np.minimum(tested.loc["attnres", "p"].min() * size, 1.0)
        assert tested.loc["attnres", "p_holm"].min() == pytest.approx(by_hand)


def renamed(tables, intervention, bands=None):
    """The same tables as if another intervention, or the same at other places, had given them."""
    out = []
    for table in tables:
        band = table["band"].map(bands) if bands else table["band"]
        cell = intervention + ":" + table["family"] + "@" + table["sublayer"] + "." + band
        out.append(table.assign(intervention=intervention, band=band, cell=cell))
    return out


def test_cell_table_corrects_each_intervention_over_its_own_grid():
    effects, mass, eligibility = random_tables()
    more, listed = renamed((effects, eligibility), "scale:0.5")
    both = cell_table(pd.concat([effects, more]), mass, pd.concat([eligibility, listed]), QUICK)
    alone = cell_table(effects, mass, eligibility, QUICK)
    assert len(both) == 2 * len(alone) and "scale:0.5:older@mlp.early" in set(both["cell"])
    of_mask = both[both["intervention"] == "mask"].reset_index(drop=True)
    pd.testing.assert_frame_equal(of_mask, alone)
    assert set(alone["family_size"].dropna()) == {5}


def test_cell_table_corrects_maps_by_benjamini_hochberg():
    effects, mass, eligibility = random_tables()
    layers = {"early": "layer0", "late": "layer5"}
    more, listed = renamed((effects, eligibility), "mask", layers)
    masses = pd.concat([mass, mass.assign(band=mass["band"].map(layers))])
    table = cell_table(pd.concat([effects, more]), masses, pd.concat([eligibility, listed]), QUICK)
    of_bands, of_layers = (
        table[table["band"].str.startswith("layer") == flag].reset_index(drop=True) for flag in (0, 1)
    )
    alone = cell_table(effects, mass, eligibility, QUICK)
    pd.testing.assert_frame_equal(of_bands, alone)
    assert set(of_layers["correction"]) == {"fdr_bh", ""} and of_layers["p_holm"].isna().all()
    for _, rows in of_layers[of_layers["eligible"]].groupby("model"):
        assert rows["p_fdr"].to_numpy() == pytest.approx(multipletests(rows["p"], method="fdr_bh")[1])
        causal = (rows["p_fdr"] <= 0.05) | (rows["kl_lower_fdr"] <= 0.05)
        assert (causal >= (rows["verdict"] == "causal")).all()


def test_contrast_table_judges_mass_apart_from_effect():
    effects, mass, eligibility = random_tables()
    alike = contrast_table(effects, eligibility, QUICK, mass=mass)
    without = contrast_table(effects, eligibility, QUICK)
    same = [column for column in CONTRAST_COLUMNS if not column.startswith("mass")]
    pd.testing.assert_frame_equal(alike[same], without[same])
    assert without["mass_p"].isna().all() and set(alike["mass_verdict"]) == {"equal"}
    larger = mass["mass"] + np.where((mass["model"] == "attnres") & (mass["family"] == "older"), 0.1, 1e-9)
    table = contrast_table(effects, eligibility, QUICK, mass=mass.assign(mass=larger)).set_index("family")
    assert table.loc["older", "mass_verdict"] == "trained larger"
    assert table.loc["older", "mass_diff"] == pytest.approx(0.1)
    assert set(table.loc["embedding", "mass_verdict"]) == {"equal"}
    # Differences that cancel exactly have p = 1 and are differences all the same.
    swing = np.where(mass["document"] % 2, 0.1, -0.1) * ((mass["model"] == "attnres") & (mass["family"] == "older"))
    table = contrast_table(effects, eligibility, QUICK, mass=mass.assign(mass=mass["mass"] + swing)).set_index("family")
    assert table.loc["older", "mass_p"] == 1.0 and table.loc["older", "mass_verdict"] == "inconclusive"


def test_tables_read_one_split():
    effects, mass, eligibility = random_tables()
    pilot = effects.assign(split="pilot", document=effects["document"] + 500, dnll=9.0)
    pilot_mass = mass.assign(split="pilot", document=mass["document"] + 500, mass=9.0)
    with_pilot = pd.concat([effects, pilot]), pd.concat([mass, pilot_mass]), eligibility
    pd.testing.assert_frame_equal(cell_table(*with_pilot, QUICK), cell_table(effects, mass, eligibility, QUICK))
    of_pilot = cell_table(*with_pilot, QUICK, split="pilot")
    assert of_pilot.loc[of_pilot["eligible"], "dnll"].to_numpy() == pytest.approx(9.0)
    assert contrast_table(with_pilot[0], eligibility, QUICK, split="pilot")["diff"].abs().max() < 1e-12


@settings(max_examples=4, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_tables_ignore_row_order_and_document_numbers(seed):
    effects, mass, eligibility = random_tables()
    rng = np.random.default_rng(seed)
    relabelled = dict(zip(effects["document"].unique(), rng.permutation(10_000)[:DOCUMENTS], strict=True))
    shuffled = [
        table.assign(document=table["document"].map(relabelled)).sample(frac=1, random_state=seed)
        for table in (effects, mass)
    ]
    expected = cell_table(effects, mass, eligibility, QUICK)
    pd.testing.assert_frame_equal(cell_table(*shuffled, eligibility, QUICK), expected, rtol=1e-12)
    np.testing.assert_array_equal(cell_table(*shuffled, eligibility, QUICK)["p"], expected["p"])
    pd.testing.assert_frame_equal(
        contrast_table(shuffled[0], eligibility, QUICK),
        contrast_table(effects, eligibility, QUICK),
        rtol=1e-12,
    )


def test_tables_repeat_with_the_seed_and_change_with_it():
    data = random_tables()
    first = cell_table(*data, QUICK)
    pd.testing.assert_frame_equal(cell_table(*data, QUICK), first)
    other = cell_table(*data, StatisticsConfig(sign_flips=999, bootstrap=100, seed=1))
    assert (other["dnll_lo"] != first["dnll_lo"])[first["eligible"]].all()
    assert (other["p"] != first["p"])[first["eligible"]].any()


def test_contrast_table_pairs_windows_and_corrects_per_baseline():
    effects, mass, eligibility = random_tables()
    recency = effects[effects["model"] == "uniform"].assign(model="recency", dnll=lambda rows: rows["dnll"] * 3)
    listed = pd.concat([eligibility, eligibility[eligibility["model"] == "uniform"].assign(model="recency")])
    table = contrast_table(pd.concat([recency, effects]), listed, QUICK)
    assert list(table.columns) == CONTRAST_COLUMNS
    assert list(zip(table["baseline"], table["cell"], strict=True)) == [
        (baseline, name(piece)) for baseline in ("uniform", "recency") for piece in ELIGIBLE
    ]
    wide = effects.pivot_table(index="document", columns=["model", "cell"], values="dnll")
    for scale, baseline in ((1, "uniform"), (3, "recency")):
        rows = table[table["baseline"] == baseline]
        diff = wide["attnres"][rows["cell"]].to_numpy() - scale * wide["uniform"][rows["cell"]].to_numpy()
        assert rows["diff"].to_numpy() == pytest.approx(diff.mean(axis=0))
        assert (rows["trained_dnll"] - rows["baseline_dnll"]).to_numpy() == pytest.approx(rows["diff"].to_numpy())
        assert rows["p_holm"].to_numpy() == pytest.approx(multipletests(rows["p"], method="holm")[1])
        # BCa and Student's intervals of the same differences are near each other.
        half = stats.t.isf(0.025, DOCUMENTS - 1) * diff.std(axis=0, ddof=1) / np.sqrt(DOCUMENTS)
        assert ((rows["diff_hi"] - rows["diff_lo"]) / 2).to_numpy() == pytest.approx(half, rel=0.35)


def test_contrast_table_verdicts():
    shared = 0.3 * noise(1)  # differs between documents far more than between models: only pairing sees through it
    zero = np.zeros(DOCUMENTS)
    trained = [0.05, -0.05, 0.001, 0.003, 0.0]
    spread = [0.01, 0.01, 0.0005, 0.02, 0.0]
    cells = {("uniform", piece): (shared, zero) for piece in ELIGIBLE}
    for place, piece in enumerate(ELIGIBLE):
        cells["attnres", piece] = (shared + trained[place] + spread[place] * noise(10 + place), zero)
    effects, _, eligibility = tables(cells)
    table = contrast_table(effects, eligibility, QUICK)
    assert table["verdict"].tolist() == [
        "trained larger",
        "baseline larger",
        "equivalent",
        "inconclusive",
        "equivalent",
    ]
    assert table.loc[2, "p_holm"] <= 0.05


def test_contrast_table_keeps_cells_eligible_in_both():
    effects, _, eligibility = random_tables()
    lost = (eligibility["model"] == "uniform") & (eligibility["family"] == "current")
    eligibility.loc[lost, "eligible"] = False
    kept = effects[~((effects["model"] == "uniform") & (effects["family"] == "current"))]
    table = contrast_table(kept, eligibility, QUICK)
    assert table["cell"].tolist() == [name(piece) for piece in ELIGIBLE if piece[0] != "current"]
    assert table["p_holm"].min() == pytest.approx(min(3 * table["p"].min(), 1.0))


def test_contrast_table_without_a_baseline_is_empty():
    effects, _, eligibility = random_tables()
    table = contrast_table(
        effects[effects["model"] == "attnres"], eligibility[eligibility["model"] == "attnres"], QUICK
    )
    assert table.empty and list(table.columns) == CONTRAST_COLUMNS


def test_contrast_table_refuses_an_unknown_trained_model():
    effects, _, eligibility = random_tables()
    with pytest.raises(ValueError, match="'trained' is not in the table"):
        contrast_table(effects, eligibility, QUICK, trained="trained")


def test_cell_table_where_all_is_excluded():
    effects, mass, eligibility = random_tables()
    table = cell_table(effects.iloc[:0], mass, eligibility.assign(eligible=False), QUICK)
    assert set(table["verdict"]) == {"excluded"} and len(table) == len(eligibility)
    assert list(table.columns) == CELL_COLUMNS


def test_tables_refuse_what_cannot_be_paired_or_averaged():
    effects, mass, eligibility = random_tables()
    with pytest.raises(ValueError, match="same windows"):
        cell_table(effects.drop(index=17), mass, eligibility, QUICK)
    with pytest.raises(ValueError, match="same windows"):
        contrast_table(effects.drop(index=17), eligibility, QUICK)
    with pytest.raises(ValueError, match="repeated rows"):
        cell_table(pd.concat([effects, effects.iloc[[3]]]), mass, eligibility, QUICK)
    with pytest.raises(ValueError, match="lacks the columns"):
        cell_table(effects.drop(columns="kl"), mass, eligibility, QUICK)
    with pytest.raises(NumericsError, match="1 rows, first at attnres"):
        cell_table(effects.assign(kl=effects["kl"].where(effects.index != 5)), mass, eligibility, QUICK)
    with pytest.raises(ValueError, match="eligibility does not list"):
        cell_table(effects, mass, eligibility[eligibility["family"] != "current"], QUICK)
    with pytest.raises(ValueError, match="eligibility repeats"):
        cell_table(effects, mass, pd.concat([eligibility, eligibility]), QUICK)
    with pytest.raises(ValueError, match="two ways"):
        cell_table(effects.assign(cell="mask"), mass, eligibility, QUICK)
    with pytest.raises(ValueError, match="no mass of mask:current@mlp.early"):
        cell_table(effects, mass[mass["family"] != "current"], eligibility, QUICK)


def test_cell_table_refuses_fewer_than_two_documents():
    effects, mass, eligibility = random_tables()
    with pytest.raises(DataError, match="1 document"):
        cell_table(effects[effects["document"] == 100], mass, eligibility, QUICK)
    with pytest.raises(DataError, match="0 document"):
        cell_table(effects, mass, eligibility, QUICK, split="pilot")
    two = [table[table["document"] < 102] for table in (effects, mass)]
    assert set(cell_table(*two, eligibility, QUICK)["verdict"]) <= {"excluded", "inconclusive", "null"}


def test_cell_table_refuses_a_grid_smaller_than_what_was_tested():
    data = random_tables()
    with pytest.raises(ConfigError, match="grid_cells=5, but 6 candidates are listed"):
        cell_table(*data, StatisticsConfig(sign_flips=999, grid_cells=5))

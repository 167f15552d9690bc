"""The design: what is refused, averaged once, and independent of the order of rows."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from attnres.depth.places import place_kind
from attnres.errors import DataError, NumericsError
from attnres.statistics.config import StatisticsConfig
from attnres.statistics.design import Design
from attnres.statistics.judgement import judge
from tests.statistics.probed_tables import measured, model_rows
from tests.statistics.small_grid import DOCUMENTS, QUICK, cells_of, contrasts_of, random_tables


def test_tables_read_one_split():
    effects, mass, eligibility = random_tables()
    pilot = effects.assign(split="pilot", document=effects["document"] + 500, dnll=9.0)
    pilot_mass = mass.assign(split="pilot", document=mass["document"] + 500, mass=9.0)
    with_pilot = pd.concat([effects, pilot]), pd.concat([mass, pilot_mass]), eligibility
    pd.testing.assert_frame_equal(cells_of(*with_pilot, QUICK), cells_of(effects, mass, eligibility, QUICK))
    names = {"pilot": "confirm", "confirm": "pilot"}
    swapped = [table.assign(split=table["split"].map(names)) for table in with_pilot[:2]]
    of_pilot = cells_of(*swapped, eligibility, QUICK)
    assert of_pilot.loc[of_pilot["eligible"], "dnll"].to_numpy() == pytest.approx(9.0)
    assert contrasts_of(swapped[0], eligibility, QUICK)["diff"].abs().max() < 1e-12


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
    expected = cells_of(effects, mass, eligibility, QUICK)
    pd.testing.assert_frame_equal(cells_of(*shuffled, eligibility, QUICK), expected, rtol=1e-12)
    np.testing.assert_array_equal(cells_of(*shuffled, eligibility, QUICK)["p"], expected["p"])
    pd.testing.assert_frame_equal(
        contrasts_of(shuffled[0], eligibility, QUICK), contrasts_of(effects, eligibility, QUICK), rtol=1e-12
    )


def test_tables_repeat_with_the_seed_and_change_with_it():
    data = random_tables()
    first = cells_of(*data, QUICK)
    pd.testing.assert_frame_equal(cells_of(*data, QUICK), first)
    other = cells_of(*data, StatisticsConfig(sign_flips=999, bootstrap=100, seed=1))
    assert (other["dnll_lo"] != first["dnll_lo"])[first["eligible"]].all()
    assert (other["p"] != first["p"])[first["eligible"]].any()


def test_tables_refuse_what_cannot_be_paired_or_averaged():
    effects, mass, eligibility = random_tables()
    with pytest.raises(ValueError, match="same windows"):
        cells_of(effects.drop(index=17), mass, eligibility, QUICK)
    with pytest.raises(ValueError, match="same windows"):
        contrasts_of(effects.drop(index=17), eligibility, QUICK)
    with pytest.raises(ValueError, match="repeated rows"):
        cells_of(pd.concat([effects, effects.iloc[[3]]]), mass, eligibility, QUICK)
    with pytest.raises(ValueError, match="lacks the columns"):
        cells_of(effects.drop(columns="kl"), mass, eligibility, QUICK)
    with pytest.raises(NumericsError, match="1 rows, first at attnres"):
        cells_of(effects.assign(kl=effects["kl"].where(effects.index != 5)), mass, eligibility, QUICK)
    with pytest.raises(ValueError, match="eligibility does not list"):
        cells_of(effects, mass, eligibility[eligibility["family"] != "current"], QUICK)
    with pytest.raises(ValueError, match="eligibility repeats"):
        cells_of(effects, mass, pd.concat([eligibility, eligibility]), QUICK)
    with pytest.raises(ValueError, match="two ways"):
        cells_of(effects.assign(cell="mask"), mass, eligibility, QUICK)
    with pytest.raises(ValueError, match="'confirmed' is not a valid Split"):
        cells_of(effects.assign(split="confirmed"), mass, eligibility, QUICK)
    with pytest.raises(ValueError, match="no mass of mask:current@mlp.early"):
        cells_of(effects, mass[mass["family"] != "current"], eligibility, QUICK)


def test_cell_table_refuses_fewer_than_two_documents():
    effects, mass, eligibility = random_tables()
    with pytest.raises(DataError, match="1 document"):
        cells_of(effects[effects["document"] == 100], mass, eligibility, QUICK)
    with pytest.raises(DataError, match="0 document"):
        cells_of(effects.assign(split="pilot"), mass, eligibility, QUICK)
    two = [table[table["document"] < 102] for table in (effects, mass)]
    assert set(cells_of(*two, eligibility, QUICK)["verdict"]) <= {"excluded", "inconclusive", "negligible"}


def test_judge_averages_documents_and_correlates_ranks_once(monkeypatch):
    pivots, ranks = [], []
    pivot, rankdata = pd.DataFrame.pivot, stats.rankdata
    monkeypatch.setattr(pd.DataFrame, "pivot", lambda *args, **given: pivots.append(1) or pivot(*args, **given))
    monkeypatch.setattr(stats, "rankdata", lambda *args, **given: ranks.append(1) or rankdata(*args, **given))
    judge(*measured(), QUICK, model_rows(("attnres", "uniform")))
    # Effects and mass in two splits; effect and measure in two models, three sets of cells and three measures.
    assert len(pivots) == 4 and len(ranks) == 2 * 2 * 3 * 3


def test_composition_is_no_band_and_a_family_of_its_own():
    """`early+layer3` once counted as a map of a place named `early`, corrected by Benjamini and Hochberg."""
    assert place_kind("early+layer3") == place_kind("early+late") == "composition"
    effects, mass, eligibility = measured()
    source = "mask:older@mlp.early"
    named = {"cell": f"{source}+mask:recent@mlp.layer3", "family": "older+recent", "band": "early+layer3"}
    both = [table[table["cell"] == source].assign(**named) for table in (effects, eligibility)]
    tables = pd.concat([effects, both[0]]), mass, pd.concat([eligibility, both[1].assign(intervention="mask+mask")])
    tables[0].loc[tables[0]["cell"] == named["cell"], "intervention"] = "mask+mask"
    models = model_rows(("attnres", "uniform"))
    alone, judged = judge(effects, mass, eligibility, QUICK, models), judge(*tables, QUICK, models)
    row = judged.cells[judged.cells["cell"] == named["cell"]].iloc[0]
    assert (row["correction"], row["family_size"]) == ("holm", 1) and row["p_holm"] == row["p"]
    others = judged.cells["cell"] != named["cell"]
    pd.testing.assert_frame_equal(judged.cells[others].reset_index(drop=True), alone.cells)
    for name in ("motifs", "spearman", "dissociation"):
        pd.testing.assert_frame_equal(getattr(judged, name), getattr(alone, name))


def test_pilot_split_is_averaged_apart_and_may_be_of_other_documents():
    design = Design.of(*measured(documents=20, pilot=5))
    counted = {split.value: len(found.documents) for split, found in design.effects.items()}
    assert counted == {"confirm": 20, "pilot": 5}

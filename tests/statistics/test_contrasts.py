"""The table of contrasts: pairing, verdicts on effect and on mass, and what is compared."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from attnres.tables.columns import CONTRASTS
from tests.statistics.small_grid import DOCUMENTS, ELIGIBLE, QUICK, contrasts_of, name, noise, random_tables, tables


def test_contrast_table_judges_mass_apart_from_effect():
    effects, mass, eligibility = random_tables()
    alike = contrasts_of(effects, eligibility, QUICK, mass=mass)
    without = contrasts_of(effects, eligibility, QUICK)
    same = [column for column in CONTRASTS.names if not column.startswith("mass")]
    pd.testing.assert_frame_equal(alike[same], without[same])
    assert without["mass_p"].isna().all() and set(alike["mass_verdict"]) == {"equal"}
    larger = mass["mass"] + np.where((mass["model"] == "attnres") & (mass["family"] == "older"), 0.1, 1e-9)
    table = contrasts_of(effects, eligibility, QUICK, mass=mass.assign(mass=larger)).set_index("family")
    assert table.loc["older", "mass_verdict"] == "trained larger"
    assert table.loc["older", "mass_diff"] == pytest.approx(0.1)
    assert set(table.loc["embedding", "mass_verdict"]) == {"equal"}
    # Differences that cancel exactly have p = 1 and are differences all the same.
    swing = np.where(mass["document"] % 2, 0.1, -0.1) * ((mass["model"] == "attnres") & (mass["family"] == "older"))
    table = contrasts_of(effects, eligibility, QUICK, mass=mass.assign(mass=mass["mass"] + swing)).set_index("family")
    assert table.loc["older", "mass_p"] == 1.0 and table.loc["older", "mass_verdict"] == "inconclusive"


def test_contrast_table_pairs_windows_and_corrects_per_baseline():
    effects, mass, eligibility = random_tables()
    recency = effects[effects["model"] == "uniform"].assign(model="recency", dnll=lambda rows: rows["dnll"] * 3)
    listed = pd.concat([eligibility, eligibility[eligibility["model"] == "uniform"].assign(model="recency")])
    table = contrasts_of(pd.concat([recency, effects]), listed, QUICK)
    assert list(table.columns) == CONTRASTS.names
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
    table = contrasts_of(effects, eligibility, QUICK)
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
    table = contrasts_of(kept, eligibility, QUICK)
    assert table["cell"].tolist() == [name(piece) for piece in ELIGIBLE if piece[0] != "current"]
    assert table["p_holm"].min() == pytest.approx(min(3 * table["p"].min(), 1.0))


def test_contrast_table_without_a_baseline_is_empty():
    effects, _, eligibility = random_tables()
    table = contrasts_of(effects[effects["model"] == "attnres"], eligibility[eligibility["model"] == "attnres"], QUICK)
    assert table.empty and list(table.columns) == CONTRASTS.names


def test_contrast_table_refuses_an_unknown_trained_model():
    effects, _, eligibility = random_tables()
    with pytest.raises(ValueError, match="'trained' is not in the table"):
        contrasts_of(effects, eligibility, QUICK, trained="trained")

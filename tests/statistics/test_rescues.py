"""The share of an effect that a rescue takes back."""

import numpy as np
import pandas as pd
import pytest

from attnres.statistics.design import Design
from attnres.statistics.rescues import rescue_table
from tests.statistics.probed_tables import QUICK

MASK, RESCUE = "mask:embedding@mlp.early", "mask:embedding@mlp.early+rescue:recent@mlp.mid"


def design_of(**effects):
    """A design of one model whose cells have these effects by document."""
    rows, listed = [], []
    for cell, values in effects.items():
        where = {"model": "attnres", "cell": cell, "intervention": "+".join(m.split(":")[0] for m in cell.split("+"))}
        where |= {"family": cell, "sublayer": "mlp", "band": "early" if cell == MASK else "early+mid"}
        listed.append(where | {"eligible": True, "reason": "", "eligible_reads": 2, "reads": 2, "mean_sources": 3.0})
        number = np.arange(len(values))
        drawn = {"document": number, "window": number, "split": "confirm"}
        rows.append(pd.DataFrame(where | drawn | {"dnll": values, "kl": 0.0, "flips": 0.0}))
    return Design.of(pd.concat(rows, ignore_index=True), pd.DataFrame(), pd.DataFrame(listed))


def test_rescue_table_gives_the_share_of_means_and_an_interval_that_draws_documents_for_both():
    rng = np.random.default_rng(0)
    lost = rng.gamma(2.0, 0.5, 200)
    noise = 0.02 * rng.normal(size=200)
    (row,) = rescue_table(design_of(**{MASK: lost, RESCUE: 0.25 * lost + noise}), QUICK).to_dict("records")
    assert (row["cell"], row["without"], row["documents"], row["reason"]) == (RESCUE, MASK, 200, "")
    assert row["recovered"] == pytest.approx(1 - row["dnll"] / row["dnll_without"], rel=1e-12)
    assert row["recovered_lo"] < row["recovered"] < row["recovered_hi"]
    # Documents that lose much also keep much: drawn apart, the interval would be five times as wide.
    assert row["recovered_hi"] - row["recovered_lo"] < 0.02
    assert row["recovered_lo"] < 0.75 < row["recovered_hi"]


def test_rescue_table_takes_back_everything_or_nothing_exactly():
    lost = np.linspace(0.5, 2.0, 30)
    for left, share in ((0 * lost, 1.0), (lost, 0.0)):
        (row,) = rescue_table(design_of(**{MASK: lost, RESCUE: left}), QUICK).to_dict("records")
        assert row["recovered"] == row["recovered_lo"] == row["recovered_hi"] == share


def test_rescue_table_gives_no_share_of_an_effect_that_may_be_nothing():
    lost = np.random.default_rng(1).normal(size=40)
    (row,) = rescue_table(design_of(**{MASK: lost, RESCUE: 0.5 * lost}), QUICK).to_dict("records")
    assert np.isnan(row["recovered"]) and row["reason"] == "the effect without the rescue is not above zero"


def test_rescue_table_says_that_the_cell_without_it_was_not_run():
    (row,) = rescue_table(design_of(**{RESCUE: np.linspace(1, 2, 9)}), QUICK).to_dict("records")
    assert row["reason"] == "the cell without the rescue was not run"
    assert rescue_table(design_of(**{MASK: np.linspace(1, 2, 9)}), QUICK).empty

"""Is the cell of largest mass the cell of largest effect? The pilot split picks both, the confirmatory one tests them.

Effect is mean dNLL (signed, nats/token), mass the mean routing weight of the family; both by document, every document
weighing the same.
"""

from typing import Any

import numpy as np
import pandas as pd

from attnres.statistics.cells import MASS_TOLERANCE
from attnres.statistics.config import StatisticsConfig
from attnres.statistics.design import Design, at_bands
from attnres.statistics.inference import Floats, adjust_p, interval, sign_flip_p
from attnres.statistics.rank_correlation import TIE_DECIMALS, cell_values
from attnres.tables import columns
from attnres.tables.names import MASK, DissociationVerdict, Measure, Split

# Attention and MLP: the family of a model's dissociation tests, whichever of them this job ran.
_SUBLAYER_TESTS = 2


def dissociation_table(design: Design, spearman: pd.DataFrame, config: StatisticsConfig) -> pd.DataFrame:
    """Per model and sublayer type: is the cell of largest mass the cell of largest effect?

    On the pilot split, `mass_cell` is the eligible cell of largest mass and `effect_cell` that of largest
    dNLL. If they are one: "coincide". Else the confirmatory split has to show both mass(mass_cell) >
    mass(effect_cell) and dnll(effect_cell) > dnll(mass_cell): two one-sided sign-flip tests by document, p
    the larger of the two (an intersection-union test), Holm over the model's two sublayer types;
    "dissociated" if that is at most alpha, else "inconclusive". `predicted_by` names the measures other than
    mass whose Spearman correlation with effect is above zero: where there are any, the dissociation is about the
    measure rather than about routing.

    Args:
        design: masked cells at bands are read.
        spearman: `spearman_table` of the same design.

    Returns:
        One row per model x sublayer type, columns `columns.DISSOCIATION`; differences and p are NaN where
        nothing was tested, and `reason` says why ("" where the verdict comes from a test).

    Raises:
        ValueError: the splits hold different cells.
    """
    rows = []
    asked, tested = (at_bands(table, MASK).sort_index() for table in (design.grid, design.tested))
    for model, sublayer in asked[["model", "sublayer"]].drop_duplicates().itertuples(index=False):
        predicts = spearman[(spearman["model"] == model) & (spearman["sublayer"] == sublayer) & spearman["predicts"]]
        row: dict[str, Any] = {
            "model": model,
            "sublayer": sublayer,
            "cells": 0,
            "verdict": DissociationVerdict.INCONCLUSIVE,
            "reason": "",
            "predicted_by": ", ".join(name for name in predicts["metric"] if name != Measure.MASS),
        }
        cells = tested[(tested["model"] == model) & (tested["sublayer"] == sublayer)]
        if Split.PILOT not in design.effects or model not in set(tested["model"]):
            row["reason"] = "no effects in the pilot or in the confirm split"
        else:
            row |= {"cells": len(cells), "documents": len(design.effects[Split.CONFIRM].documents)}
            row |= _dissociation(design, cells, config)
        rows.append(row)
    table = pd.DataFrame(rows).reindex(columns=columns.DISSOCIATION.names)
    for _, tests in table[table["p"].notna()].groupby("model"):
        table.loc[tests.index, "p_holm"] = adjust_p(tests["p"].to_numpy(dtype=np.float64), _SUBLAYER_TESTS)
    table.loc[table["p_holm"] <= config.alpha, "verdict"] = DissociationVerdict.DISSOCIATED
    return table


def pick_cells(mass: Floats, effect: Floats) -> tuple[int, int] | None:
    """The cell of largest mass and that of largest effect, from means [cells] on the pilot split.

    Masses that differ by rounding only are equal: the effect is then in a cell of largest mass. None where no cell
    has a positive effect.
    """
    if effect.max() <= 10.0**-TIE_DECIMALS:
        return None
    by_effect = int(effect.argmax())
    by_mass = by_effect if mass[by_effect] >= mass.max() - MASS_TOLERANCE else int(mass.argmax())
    return by_mass, by_effect


def paired_differences(mass: Floats, dnll: Floats, by_mass: int, by_effect: int) -> Floats:
    """What has to be above zero for a dissociation, by document: [documents, 2].

    Args:
        mass: [documents, cells] on the confirmatory split.
        dnll: the same.
        by_mass: the cell picked for its mass.
        by_effect: the cell picked for its effect.
    """
    return np.stack([mass[:, by_mass] - mass[:, by_effect], dnll[:, by_effect] - dnll[:, by_mass]], axis=1)


def _dissociation(design: Design, cells: pd.DataFrame, config: StatisticsConfig) -> dict[str, Any]:
    """Of one model and sublayer: cells picked on the pilot split and, where they differ, the tests."""
    if len(cells) < 2:
        return {"reason": "fewer than two eligible cells"}
    values = {}
    for split in Split:
        dnll, measures = cell_values(design, cells, split)
        values[split] = measures[Measure.MASS], dnll
    picks = pick_cells(*(by_document.mean(axis=0) for by_document in values[Split.PILOT]))
    if picks is None:
        return {"reason": "no cell has a positive effect on the pilot split"}
    by_mass, by_effect = picks
    names = cells["cell"].to_numpy()
    row = {"mass_cell": names[by_mass], "effect_cell": names[by_effect]}
    if by_mass == by_effect:
        reason = "one cell has the largest mass and the largest effect on the pilot split"
        return row | {"verdict": DissociationVerdict.COINCIDE, "reason": reason}
    differences = paired_differences(*values[Split.CONFIRM], by_mass, by_effect)
    low, high = interval(differences, config)
    p = sign_flip_p(differences, config.sign_flips, config.seed, "greater")
    for column, name in enumerate(("mass", "effect")):
        row |= {f"{name}_diff": differences[:, column].mean(), f"{name}_p": p[column]}
        row |= {f"{name}_diff_lo": low[column], f"{name}_diff_hi": high[column]}
    return row | {"p": p.max()}

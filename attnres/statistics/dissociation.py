"""Is the cell of largest mass the cell of largest effect? The pilot split picks both, the confirmatory one tests them.

Effect is mean dNLL (signed, nats/token), mass the mean routing weight of the family; both by document, every document
weighing the same.
"""

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from attnres.statistics.cells import MASS_TOLERANCE
from attnres.statistics.config import StatisticsConfig
from attnres.statistics.design import OF_EFFECT, OF_MASS, Averages, Design, at_bands, units
from attnres.statistics.inference import Floats, adjust_p
from attnres.statistics.looks import Sample
from attnres.statistics.rank_correlation import TIE_DECIMALS
from attnres.tables import columns
from attnres.tables.names import MASK, DissociationVerdict, Measure, Split

# Standard errors of both means between a cell and the best at which it leaves the race.
_OUT = 2.0
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
            row |= {"cells": len(cells), "documents": int(design.effects[Split.CONFIRM].look.size)}
            row |= _dissociation(design, cells, config)
        rows.append(row)
    table = pd.DataFrame(rows).reindex(columns=columns.DISSOCIATION.names).astype({"looks": "Int64"})
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
    names = cells["cell"].to_numpy()
    pilot = _samples(design, cells, Split.PILOT)
    picks = pick_cells(pilot[0].mean(), np.where(in_race(pilot[1]), pilot[1].mean(), -np.inf))
    if picks is None:
        return {"reason": "no cell has a positive effect on the pilot split"}
    by_mass, by_effect = picks
    row = {"mass_cell": names[by_mass], "effect_cell": names[by_effect]}
    if by_mass == by_effect:
        reason = "one cell has the largest mass and the largest effect on the pilot split"
        return row | {"verdict": DissociationVerdict.COINCIDE, "reason": reason}
    mass, effect = _samples(design, cells, Split.CONFIRM)
    differences = effect.with_values(paired_differences(mass.values, effect.values, by_mass, by_effect))
    (low, high), means = differences.interval(config), differences.mean()
    p = differences.sign_flip_p(config, "greater")
    row |= {"documents": int(differences.documents.min()), "looks": int(differences.depth.min())}
    for column, name in enumerate(("mass", "effect")):
        row |= {f"{name}_diff": means[column], f"{name}_p": p[column]}
        row |= {f"{name}_diff_lo": low[column], f"{name}_diff_hi": high[column]}
    return row | {"p": p.max()}


def _samples(design: Design, cells: pd.DataFrame, split: Split) -> tuple[Sample, Sample]:
    """Mass and effect of some cells by document, at the documents of the effects."""
    mass, effects = design.mass[split], design.effects[split]
    effect = effects.sample("dnll", units(cells, OF_EFFECT))
    return _at(mass, effects, mass.sample(Measure.MASS, units(cells, OF_MASS))), effect


def _at(mass: Averages, effects: Averages, sample: Sample) -> Sample:
    """A sample of masses at the documents that have effects."""
    there = np.isin(mass.documents, effects.documents)
    return Sample(np.ascontiguousarray(sample.values.T[:, there]).T, effects.look, sample.shares)


def in_race(effect: Sample) -> NDArray[np.bool_]:
    """Which cells may still be the cell of largest effect on the pilot split, at its last look: [cells].

    A cell leaves the race at the first look at which its mean lies further below the largest than both means' standard
    errors allow, `_OUT` times over. What is picked here is tested elsewhere: the rule needs no level.
    """
    inside = effect.depth > 0
    for look in range(1, int(effect.depth.max(initial=0)) + 1):
        columns = np.flatnonzero(inside & (effect.depth >= look))
        values = effect.first(look, columns)
        mean, error = values.mean(axis=0), values.std(axis=0, ddof=1) / np.sqrt(len(values))
        best = mean.argmax()
        inside = np.zeros_like(inside)
        inside[columns[mean + _OUT * error >= mean[best] - _OUT * error[best]]] = True
    return inside

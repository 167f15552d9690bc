"""Motifs: cells whose family does there what it does not do elsewhere, and what an equal loss of mass does not do.

A motif is causal, exceeds the mean of its family's other eligible cells, and exceeds its matched control (the same mass
removed from sources outside the family); without a control nothing is called one. Whether it was learned is another
question, answered by the contrast with a baseline that shares the source convention; and whether its mass was learned
is a third one.
"""

from typing import Any

import numpy as np
import pandas as pd

from attnres.statistics.config import StatisticsConfig
from attnres.statistics.design import OF_EFFECT, Averages, Design, at_bands, units
from attnres.statistics.inference import Floats, adjust_p, sign_flip_p
from attnres.statistics.verdicts import NOT_RUN, RUN, motif_verdicts
from attnres.tables import columns
from attnres.tables.columns import SLICE
from attnres.tables.names import KEEP, MASK, MATCHED, ContrastVerdict, Learned, Model, Shown, Split, Verdict

_PERMUTATION_STREAM = 4
# A motif's effect is learned if it is larger than in the baseline; its mass, if it is larger or smaller.
_EFFECT_LEARNED = {
    ContrastVerdict.TRAINED_LARGER: Learned.LEARNED,
    ContrastVerdict.BASELINE_LARGER: Learned.INHERITED,
    ContrastVerdict.EQUIVALENT: Learned.INHERITED,
    ContrastVerdict.INCONCLUSIVE: Learned.UNDECIDED,
}
_MASS_LEARNED = {
    ContrastVerdict.TRAINED_LARGER: Learned.LEARNED,
    ContrastVerdict.BASELINE_LARGER: Learned.LEARNED,
    ContrastVerdict.EQUAL: Learned.INHERITED,
    ContrastVerdict.INCONCLUSIVE: Learned.UNDECIDED,
}


def motif_table(
    design: Design, cells: pd.DataFrame, contrasts: pd.DataFrame, config: StatisticsConfig, shared: str | None
) -> pd.DataFrame:
    """Is each masked cell at a band a motif, in each model: the table `motifs.csv`.

    Both comparisons are one-sided sign-flip tests by document; p is the larger of the two (an intersection-union
    test), Holm within a model over the sizes of its family in `cells`. Verdicts: "motif" if the cell is causal with a
    positive effect and Holm's p is at most alpha; "uncontrolled" if that is so but no matched control was run, or none
    is possible (p is then that of the other comparison); "no motif" if the cell is negligible, or an interval lies
    wholly below zero, or the effect does; else "inconclusive".

    Args:
        design: the confirmatory split is read.
        cells: `cell_table` of the same design.
        contrasts: `contrast_table` of the same design, for what was learned.
        shared: the baseline that shares the trained model's source convention, or None.

    Returns:
        One row per model x eligible cell at a band, columns `columns.MOTIFS`. `matched` says "run", "not run" or why
        the control is excluded. `effect_learned` and `mass_learned`, of the trained model only: "learned",
        "inherited" (no larger than in the baseline), "undecided" or "not tested". `necessity`, `sufficiency` and
        `specificity` change no verdict.

    Raises:
        ValueError: a verdict of `contrasts` is none.
    """
    banded = at_bands(cells, MASK)
    banded = banded[banded["eligible"]]
    if banded.empty:
        return pd.DataFrame(columns=columns.MOTIFS.names)
    effects = design.effects[Split.CONFIRM]
    controls = cells[cells["intervention"] == MATCHED].set_index(["model", *SLICE])
    learned = _learned(contrasts[(contrasts["baseline"] == shared) & (contrasts["intervention"] == MASK)])
    tables = []
    for model, rows in banded.groupby("model", sort=False):
        compared = [_compared(row, rows, effects, controls) for row in rows.itertuples()]
        own = effects.sample("dnll", units(rows, OF_EFFECT))
        differences = own.with_values(np.stack([column for _, *pair in compared for column in pair], axis=1))
        p, (low, high) = differences.sign_flip_p(config, "greater"), differences.interval(config)
        means = np.full(differences.values.shape[1], np.nan)
        for _, columns_there, values in differences.by_depth():
            # Summed document by document, as the tables of record were.
            means[columns_there] = np.ascontiguousarray(values).mean(axis=0)
        table = pd.DataFrame([row for row, *_ in compared])
        for place, name in enumerate(("elsewhere", "matched")):
            table[f"{name}_diff"] = means[place::2]
            table[f"{name}_diff_lo"], table[f"{name}_diff_hi"] = low[place::2], high[place::2]
            table[f"{name}_p"] = p[place::2]
        table["p"] = table[["elsewhere_p", "matched_p"]].max(axis=1).where(table["elsewhere_p"].notna())
        tested = table.index[table["p"].notna()]
        size = max(int(rows["family_size"].iloc[0]), len(tested))
        if len(tested):
            table.loc[tested, "p_holm"] = adjust_p(table.loc[tested, "p"], size)
        controlled = table.index[table["matched_p"].notna()]
        if len(controlled):
            table.loc[controlled, "matched_p_holm"] = adjust_p(table.loc[controlled, "matched_p"], size)
        table["documents"], table["looks"] = own.documents, own.depth
        for name in ("effect_learned", "mass_learned"):
            of_trained = [learned.get(cell, {}).get(name, Learned.NOT_TESTED) for cell in table["cell"]]
            table[name] = of_trained if model == Model.TRAINED else ""
        tables.append(table)
    table = pd.concat(tables, ignore_index=True).reindex(columns=columns.MOTIFS.names)
    table["ruled_out"] |= (table["elsewhere_diff_hi"] < 0) | (table["matched_diff_hi"] < 0)
    table["verdict"] = motif_verdicts(table, table["p_holm"], config.alpha)
    return _labelled(table, cells, config.alpha)


def _labelled(table: pd.DataFrame, cells: pd.DataFrame, alpha: float) -> pd.DataFrame:
    """What is shown of each cell beside its verdict: necessity, sufficiency, specificity."""
    kept = cells[(cells["intervention"] == KEEP) & cells["eligible"]]
    alone = dict(zip(units(kept, ["model", *SLICE]), kept["verdict"] == Verdict.NEGLIGIBLE, strict=True))
    specific = table["matched_p_holm"].le(alpha).where(table["matched_p_holm"].notna())
    return table.assign(
        necessity=table["causal"].map(_shown),
        sufficiency=[_shown(alone.get(place)) for place in units(table, ["model", *SLICE])],
        specificity=specific.map(_shown),
    )


def _shown(found: bool | float | None) -> Shown:
    if found is None or found != found:
        return Shown.NOT_TESTED
    return Shown.SHOWN if found else Shown.NOT_SHOWN


def less_elsewhere(effects: Floats, cell: int) -> Floats:
    """By document, the effect of a cell less the mean of its family's others: [documents] from [documents, cells]."""
    return effects[:, cell] - np.delete(effects, cell, axis=1).mean(axis=1)


def _compared(
    row: Any, rows: pd.DataFrame, effects: Averages, controls: pd.DataFrame
) -> tuple[dict[str, object], Floats, Floats]:
    """A cell's coordinates, and by document its effect less its family's elsewhere, and less its control's."""
    family = list(rows.loc[rows["family"] == row.family, "cell"])
    dnll, place = effects.sample("dnll", [(row.model, cell) for cell in family]).values, family.index(row.cell)
    missing = np.full(len(dnll), np.nan)
    elsewhere = less_elsewhere(dnll, place) if len(family) > 1 else missing
    key = (row.model, row.family, row.sublayer, row.band)
    matched, control = missing, NOT_RUN
    if key in controls.index:
        listed = controls.loc[key]
        control = RUN if listed["eligible"] else str(listed["reason"])
        if listed["eligible"]:
            matched = dnll[:, place] - effects.sample("dnll", [(row.model, listed["cell"])]).values[:, 0]
    coordinates = {
        **{name: getattr(row, name) for name in ("model", "cell", *SLICE)},
        "causal": Verdict(row.verdict) == Verdict.CAUSAL and row.dnll > 0,
        "ruled_out": Verdict(row.verdict) == Verdict.NEGLIGIBLE or row.dnll_hi < 0,
        "others": len(family) - 1,
        "matched": control,
    }
    return coordinates, elsewhere, matched


def _learned(contrasts: pd.DataFrame) -> dict[str, dict[str, Learned]]:
    """By cell, what a contrast with the shared baseline says of effect and of mass; mass may not have been tested."""
    return {
        row.cell: {
            "effect_learned": _EFFECT_LEARNED[ContrastVerdict(row.verdict)],
            "mass_learned": _MASS_LEARNED[ContrastVerdict(row.mass_verdict)]
            if isinstance(row.mass_verdict, str) and row.mass_verdict
            else Learned.NOT_TESTED,
        }
        for row in contrasts.itertuples()
    }


def permutation_null(design: Design, cells: pd.DataFrame, config: StatisticsConfig) -> dict[str, float | int]:
    """How often the comparison of a cell with its family elsewhere finds something where families mean nothing.

    In every permuted table the effects of one document at one sublayer type and band are dealt out anew to the
    families that are eligible there. What bands and sublayers do on their own would still show, whatever the labels,
    so each document's mean there is taken off first. Holm over the cells, as for motifs.

    Args:
        design: the trained model's masked cells at bands are permuted, on the confirmatory split.
        cells: `cell_table` of the same design.
        config: level, flips, seed, and how many tables.

    Returns:
        `permutations`, `cells`, `found` (tables in which any cell stands out) and `rate`.
    """
    rows = at_bands(cells[cells["eligible"] & (cells["model"] == Model.TRAINED)], MASK).reset_index(drop=True)
    if config.permutations == 0 or rows.empty or rows["family"].value_counts().max() < 2:
        return {"permutations": 0, "cells": len(rows), "found": 0, "rate": 0.0}
    effects = design.effects[Split.CONFIRM]
    dnll = effects.of("dnll", [(Model.TRAINED, cell) for cell in rows["cell"]], config.rank_look)
    groups = [np.asarray(places) for places in rows.groupby(["sublayer", "band"]).indices.values()]
    families = [np.asarray(places) for places in rows.groupby("family").indices.values() if len(places) > 1]
    rng = np.random.default_rng([config.seed, _PERMUTATION_STREAM])
    stand_out = 0
    for _ in range(config.permutations):
        dealt = np.empty_like(dnll)
        for places in groups:
            centred = dnll[:, places] - dnll[:, places].mean(axis=1, keepdims=True)
            dealt[:, places] = rng.permuted(centred, axis=1)
        differences = np.stack([less_elsewhere(dealt[:, f], k) for f in families for k in range(len(f))], axis=1)
        p = sign_flip_p(differences, config.sign_flips, config.seed, "greater")
        stand_out += int(adjust_p(p, len(p)).min() <= config.alpha)
    return {
        "permutations": config.permutations, "cells": len(rows), "found": stand_out,
        "rate": stand_out / config.permutations,
    }  # fmt: skip

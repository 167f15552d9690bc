"""Motifs: cells whose family does there what it does not do elsewhere, and what an equal loss of mass does not do.

A motif is causal, exceeds the mean of its family's other eligible cells, and exceeds its matched control (the same mass
removed from sources outside the family); without a control nothing is called one. Whether it was learned is another
question, answered by the contrast with a baseline that shares the source convention; and whether its mass was learned
is a third one.
"""

from typing import Any

import numpy as np
import pandas as pd

from attnres.depth.places import place_kind
from attnres.statistics.cells import SLICE, document_means
from attnres.statistics.config import StatisticsConfig
from attnres.statistics.inference import Floats, adjust_p, bca_interval, sign_flip_p

CONTROL = "matched"
MOTIF_COLUMNS = [
    *("model", "cell", *SLICE, "documents", "causal", "others"),
    *("elsewhere_diff", "elsewhere_diff_lo", "elsewhere_diff_hi", "elsewhere_p"),
    *("matched", "matched_diff", "matched_diff_lo", "matched_diff_hi", "matched_p"),
    *("ruled_out", "p", "p_holm", "verdict", "effect_learned", "mass_learned"),
]
_PERMUTATION_STREAM = 4


def motif_table(
    effects: pd.DataFrame,
    cells: pd.DataFrame,
    contrasts: pd.DataFrame,
    config: StatisticsConfig,
    trained: str = "attnres",
    shared: str | None = "uniform",
    intervention: str = "mask",
    split: str = "confirm",
) -> pd.DataFrame:
    """Is each cell a motif, in each model: the table `motifs.csv`.

    Both comparisons are one-sided sign-flip tests by document; p is the larger of the two (an intersection-union
    test), Holm within a model over the sizes of its family in `cells`. Verdicts: "motif" if the cell is causal with a
    positive effect and Holm's p is at most alpha; "uncontrolled" if that is so but no matched control was run, or none
    is possible (p is then that of the other comparison); "no motif" if the cell is null, or an interval lies wholly
    below zero, or the effect does; else "inconclusive".

    Args:
        effects: one row per model x cell x window.
        cells: `cell_table` of the same effects.
        contrasts: `contrast_table` of the same effects, for what was learned.
        config: level, resampling and seed.
        trained: name of the trained model.
        shared: the baseline that shares the trained model's source convention, or None.
        intervention: the intervention whose effect is meant.
        split: the split that is tested.

    Returns:
        One row per model x eligible cell at a band, columns `MOTIF_COLUMNS`. `matched` says "run", "not run" or why
        the control is excluded. `effect_learned` and `mass_learned`, of the trained model only: "learned",
        "inherited" (no larger than in the baseline), "undecided" or "not tested".
    """
    banded = cells[(cells["intervention"] == intervention) & (cells["band"].map(place_kind) == "band")]
    banded = banded[banded["eligible"]]
    if banded.empty:
        return pd.DataFrame(columns=MOTIF_COLUMNS)
    means, _ = document_means(effects, ["model", "cell"], ["dnll"], split)
    controls = cells[cells["intervention"] == CONTROL].set_index(["model", *SLICE])
    learned = _learned(contrasts[(contrasts["baseline"] == shared) & (contrasts["intervention"] == intervention)])
    tables = []
    for model, rows in banded.groupby("model", sort=False):
        dnll = means["dnll"][model]
        found = [_compared(row, rows, dnll, controls) for row in rows.itertuples()]
        differences = np.stack([part for _, *pair in found for part in pair], axis=1)
        known = np.flatnonzero(~np.isnan(differences[0]))
        p, low, high = (np.full(differences.shape[1], np.nan) for _ in range(3))
        if len(known):
            p[known] = sign_flip_p(differences[:, known], config.sign_flips, config.seed, "greater")
            low[known], high[known] = bca_interval(
                differences[:, known], config.bootstrap, 1 - config.alpha, config.seed
            )
        table = pd.DataFrame([row for row, *_ in found])
        for place, name in enumerate(("elsewhere", "matched")):
            table[f"{name}_diff"] = differences.mean(axis=0)[place::2]
            table[f"{name}_diff_lo"], table[f"{name}_diff_hi"] = low[place::2], high[place::2]
            table[f"{name}_p"] = p[place::2]
        table["p"] = table[["elsewhere_p", "matched_p"]].max(axis=1).where(table["elsewhere_p"].notna())
        tested = table.index[table["p"].notna()]
        if len(tested):
            size = max(int(rows["family_size"].iloc[0]), len(tested))
            table.loc[tested, "p_holm"] = adjust_p(table.loc[tested, "p"], size)
        table["documents"] = len(means)
        table["effect_learned"], table["mass_learned"] = "", ""
        if model == trained:
            for name in ("effect_learned", "mass_learned"):
                table[name] = [learned.get(cell, {}).get(name, "not tested") for cell in table["cell"]]
        tables.append(table)
    table = pd.concat(tables, ignore_index=True).reindex(columns=MOTIF_COLUMNS)
    table["ruled_out"] |= (table["elsewhere_diff_hi"] < 0) | (table["matched_diff_hi"] < 0)
    table["verdict"] = motif_verdicts(table, table["p_holm"], config.alpha)
    return table


def less_elsewhere(effects: Floats, cell: int) -> Floats:
    """By document, the effect of a cell less the mean of its family's others: [documents] from [documents, cells]."""
    return effects[:, cell] - np.delete(effects, cell, axis=1).mean(axis=1)


def motif_verdicts(table: pd.DataFrame, p_adjusted: pd.Series, alpha: float) -> np.ndarray:
    """Verdicts of rows of a motif table, given p as corrected."""
    stands_out = table["causal"].astype(bool) & (p_adjusted <= alpha)
    controlled = table["matched"] == "run"
    return np.select(
        [stands_out & controlled, table["ruled_out"].astype(bool), stands_out],
        ["motif", "no motif", "uncontrolled"],
        "inconclusive",
    )


def _compared(
    row: Any, rows: pd.DataFrame, dnll: pd.DataFrame, controls: pd.DataFrame
) -> tuple[dict[str, object], Floats, Floats]:
    """A cell's coordinates, and by document its effect less its family's elsewhere, and less its control's."""
    missing = np.full(len(dnll), np.nan)
    family = list(rows.loc[rows["family"] == row.family, "cell"])
    effect, others = dnll[row.cell].to_numpy(), len(family) - 1
    elsewhere = less_elsewhere(dnll[family].to_numpy(), family.index(row.cell)) if others else missing
    key = (row.model, row.family, row.sublayer, row.band)
    matched, told = missing, "not run"
    if key in controls.index:
        control = controls.loc[key]
        told = "run" if control["eligible"] else str(control["reason"])
        if control["eligible"]:
            matched = effect - dnll[control["cell"]].to_numpy()
    found = {name: getattr(row, name) for name in ("model", "cell", *SLICE)}
    causal = row.verdict == "causal" and row.dnll > 0
    ruled_out = row.verdict == "null" or row.dnll_hi < 0
    return (
        found | {"causal": causal, "ruled_out": ruled_out, "others": others, "matched": told},
        elsewhere,
        matched,
    )


def _learned(contrasts: pd.DataFrame) -> dict[str, dict[str, str]]:
    effect = {"trained larger": "learned", "baseline larger": "inherited", "equivalent": "inherited"}
    # The mass of a family may be learned to be larger or smaller; the effect of a motif is learned if it is larger.
    mass = {"trained larger": "learned", "baseline larger": "learned", "equal": "inherited", "": "not tested"}
    return {
        row.cell: {
            "effect_learned": effect.get(row.verdict, "undecided"),
            "mass_learned": mass.get("" if pd.isna(row.mass_verdict) else row.mass_verdict, "undecided"),
        }
        for row in contrasts.itertuples()
    }


def permutation_null(
    effects: pd.DataFrame,
    cells: pd.DataFrame,
    config: StatisticsConfig,
    permutations: int,
    model: str = "attnres",
    intervention: str = "mask",
    split: str = "confirm",
) -> dict[str, float | int]:
    """How often the comparison of a cell with its family elsewhere finds something where families mean nothing.

    In every permuted table the effects of one document at one sublayer type and band are dealt out anew to the
    families that are eligible there. What bands and sublayers do on their own would still show, whatever the labels,
    so each document's mean there is taken off first. Holm over the cells, as for motifs.

    Args:
        effects: one row per model x cell x window.
        cells: `cell_table` of the same effects.
        config: level, flips and seed.
        permutations: how many tables.
        model, intervention, split: what is permuted.

    Returns:
        `permutations`, `cells`, `found` (tables in which any cell stands out) and `rate`.
    """
    rows = cells[(cells["model"] == model) & (cells["intervention"] == intervention) & cells["eligible"]]
    rows = rows[rows["band"].map(place_kind) == "band"].reset_index(drop=True)
    counts = rows["family"].value_counts()
    found = 0
    if permutations == 0 or rows.empty or counts.max() < 2:
        return {"permutations": 0, "cells": len(rows), "found": 0, "rate": 0.0}
    means, _ = document_means(effects[effects["model"] == model], ["cell"], ["dnll"], split)
    dnll = means["dnll"][list(rows["cell"])].to_numpy()
    groups = [np.asarray(places) for places in rows.groupby(["sublayer", "band"]).indices.values()]
    families = [np.asarray(places) for places in rows.groupby("family").indices.values() if len(places) > 1]
    rng = np.random.default_rng([config.seed, _PERMUTATION_STREAM])
    for _ in range(permutations):
        dealt = np.empty_like(dnll)
        for places in groups:
            centred = dnll[:, places] - dnll[:, places].mean(axis=1, keepdims=True)
            dealt[:, places] = rng.permuted(centred, axis=1)
        differences = np.stack([less_elsewhere(dealt[:, f], k) for f in families for k in range(len(f))], axis=1)
        p = sign_flip_p(differences, config.sign_flips, config.seed, "greater")
        found += int(adjust_p(p, len(p)).min() <= config.alpha)
    return {"permutations": permutations, "cells": len(rows), "found": found, "rate": found / permutations}

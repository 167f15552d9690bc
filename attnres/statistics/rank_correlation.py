"""What predicts where the effect is: rank correlations of effect with mass and with measures that know vector lengths.

Cells are fixed, documents are resampled: an interval speaks of these cells on other documents.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from attnres.statistics.config import StatisticsConfig
from attnres.statistics.design import OF_EFFECT, OF_MASS, Design, at_bands, averages, units
from attnres.statistics.inference import Floats, adjust_p
from attnres.tables import columns
from attnres.tables.names import MASK, Measure, Model, Split

# In the place of a sublayer: cells of all sublayers.
ALL = "all"
_BOOTSTRAP_STREAM = 3
# Cells that differ by less, as under uniform routing, differ by fp32 rounding: ties in rank.
TIE_DECIMALS = 7


@dataclass(frozen=True)
class Difference:
    """A difference of two correlations: its percentile interval, and the p of no difference that inverts it."""

    value: float = np.nan
    low: float = np.nan
    high: float = np.nan
    p: float = np.nan


def spearman_table(design: Design, config: StatisticsConfig) -> pd.DataFrame:
    """Spearman correlation, over eligible masked cells at bands, of effect with mass, norm-aware share and
    displacement, on the confirmatory split.

    Intervals are percentile intervals over bootstrapped documents, the same for effect and measure; where documents
    came in looks, over those of the last look within `rank_look` that all cells of a model have. Resampling adds noise
    to the means, so intervals lean towards zero. `predicts` says that the lower limit is above zero.

    Returns:
        One row per model x ("attn", "mlp", "all") x measure, columns `columns.SPEARMAN`; rho is NaN with fewer than
        three cells or where effect or measure does not vary.
    """
    rows = []
    tested = at_bands(design.tested, MASK)
    for model, cells in tested.groupby("model", sort=False):
        effects = design.effects[Split.CONFIRM]
        documents = len(effects.of("dnll", units(cells, OF_EFFECT), config.rank_look))
        resamples = document_resamples(documents, config)
        dnll, measures = cell_values(design, cells, documents)
        for sublayer in [*cells["sublayer"].unique(), ALL]:
            chosen = (cells["sublayer"] == sublayer).to_numpy() | (sublayer == ALL)
            rho = {
                measure: bootstrapped_spearman(dnll[:, chosen], values[:, chosen], resamples)
                for measure, values in measures.items()
            }
            for measure, resampled in rho.items():
                low, high = percentile_interval(resampled, config.alpha)
                over = resampled - rho[Measure.MASS]
                against = Difference() if measure == Measure.MASS else percentile_test(over, config.alpha)
                rows.append(
                    {
                        "model": model,
                        "sublayer": sublayer,
                        "metric": measure.value,
                        "cells": int(chosen.sum()),
                        "documents": documents,
                        "rho": resampled[0],
                        "rho_lo": low,
                        "rho_hi": high,
                        "predicts": bool(low > 0),
                        "over_mass": against.value,
                        "over_mass_lo": against.low,
                        "over_mass_hi": against.high,
                        "over_mass_p": against.p,
                    }
                )
    return pd.DataFrame(rows, columns=columns.SPEARMAN.names)


def cell_values(design: Design, cells: pd.DataFrame, within: int) -> tuple[Floats, dict[Measure, Floats]]:
    """By document, dnll and each measure of some cells: [documents, cells], on the looks within so many documents."""
    effects, mass = design.effects[Split.CONFIRM], design.mass[Split.CONFIRM]
    slices = units(cells, OF_MASS)
    measures = {measure: mass.of(measure, slices, within) for measure in Measure}
    return effects.of("dnll", units(cells, OF_EFFECT), within), measures


def document_resamples(documents: int, config: StatisticsConfig) -> Floats:
    """How often each document is drawn in each resample: [resamples, documents]."""
    rng = np.random.default_rng([config.seed, _BOOTSTRAP_STREAM])
    return rng.multinomial(documents, np.full(documents, 1 / documents), size=config.bootstrap).astype(np.float64)


def bootstrapped_spearman(effect: Floats, measure: Floats, resamples: Floats) -> Floats:
    """Spearman of the means of two [documents, cells]: first of all documents, then of each resample.

    `resamples` is what `document_resamples` gives. NaN where one side does not vary, and everywhere with fewer than
    three cells.
    """
    documents, cells = effect.shape
    if cells < 3:
        return np.full(1 + len(resamples), np.nan)
    joint = np.concatenate([effect, measure], axis=1)
    # Resamples depend neither on how documents are numbered nor on the order of cells, and are one for all measures.
    joint = joint[np.lexsort(np.sort(effect, axis=1).T)]
    means = np.concatenate([joint.mean(axis=0, keepdims=True), resamples @ joint / documents])
    means = means.round(TIE_DECIMALS)
    # Pearson's correlation of ranks, over all resamples at once.
    x, y = (stats.rankdata(side, axis=1) - (cells + 1) / 2 for side in (means[:, :cells], means[:, cells:]))
    with np.errstate(invalid="ignore"):
        return (x * y).sum(axis=1) / np.sqrt((x * x).sum(axis=1) * (y * y).sum(axis=1))


def percentile_interval(values: Floats, alpha: float) -> tuple[float, float]:
    """Percentile interval of resampled values, the first being the observed one; NaN if that is."""
    resampled = values[1:][np.isfinite(values[1:])]
    if not np.isfinite(values[0]) or len(resampled) == 0:
        return np.nan, np.nan
    low, high = np.quantile(resampled, [alpha / 2, 1 - alpha / 2])
    return float(low), float(high)


def percentile_test(values: Floats, alpha: float) -> Difference:
    """`values` are the observed difference and its resamples, as `bootstrapped_spearman` orders them."""
    low, high = percentile_interval(values, alpha)
    resampled = values[1:][np.isfinite(values[1:])]
    if not np.isfinite(low):
        return Difference()
    tail = min((resampled <= 0).sum(), (resampled >= 0).sum())
    return Difference(float(values[0]), low, high, min(1.0, 2 * (1 + tail) / (1 + len(resampled))))


def which_predicts(spearman: pd.DataFrame, alpha: float, model: str = Model.TRAINED) -> dict[str, Any]:
    """Which of mass, norm-aware share and displacement predicts effect, over all cells of a model.

    Returns:
        `statement`, and per measure its `rho`, interval, and the test of its difference from mass. `better` names the
        measures that were shown to predict better than mass, `worse` those shown to predict worse (Holm over the two).
    """
    rows = spearman[(spearman["model"] == model) & (spearman["sublayer"] == ALL)].set_index("metric")
    if rows.empty or rows["rho"].isna().all():
        return {"statement": "too few cells to say what predicts effect", "better": [], "worse": []}
    others = [name for name in Measure if name != Measure.MASS and np.isfinite(rows.loc[name, "over_mass_p"])]
    adjusted = dict(zip(others, adjust_p(rows.loc[others, "over_mass_p"], len(Measure) - 1), strict=True))
    shown = [name for name in others if adjusted[name] <= alpha]
    better = [name for name in shown if rows.loc[name, "over_mass"] > 0]
    worse = [name for name in shown if rows.loc[name, "over_mass"] < 0]
    names = {
        Measure.MASS: "mass", Measure.NORM_SHARE: "norm-aware share", Measure.DISPLACEMENT: "displacement",
    }  # fmt: skip
    correlations = ", ".join(
        f"{names[Measure(name)]} {row['rho']:+.2f} [{row['rho_lo']:+.2f}, {row['rho_hi']:+.2f}]"
        for name, row in rows.iterrows()
        if np.isfinite(row["rho"])
    )
    if better:
        verb = "predict" if len(better) > 1 else "predicts"
        verdict = f"{' and '.join(names[name] for name in better)} {verb} effect better than mass does"
    elif worse:
        verdict = f"mass predicts effect better than {' and '.join(names[name] for name in worse)}"
    else:
        verdict = "no difference was shown between mass and the others"
    cells = int(rows["cells"].iloc[0])
    return {
        "statement": f"rank correlation with effect over {cells} cells: {correlations}; {verdict}",
        "better": [name.value for name in better],
        "worse": [name.value for name in worse],
    } | {name.value: {"over_mass_p_holm": float(adjusted[name])} for name in others}


def against_exact(estimates: pd.DataFrame, design: Design, config: StatisticsConfig) -> dict[str, Any]:
    """How estimates of effects from gradients stand to the exact effects of the same cells, on the confirmatory split.

    Args:
        estimates: one row per cell x window of one model, `estimate` in nats/token.

    Returns:
        `attribution`, a row per cell with its `model`, mean `estimate` and exact mean `dnll` in nats/token; and
        `attribution_rank`, Spearman's `rho` over them with `rho_lo` and `rho_hi`, a percentile interval over
        `documents` (None where there is none).
    """
    model = str(estimates["model"].iloc[0])
    cells = list(dict.fromkeys(estimates["cell"]))
    estimated, exact = averages(estimates, ["cell"], ["estimate"], Split.CONFIRM), design.effects[Split.CONFIRM]
    sample = exact.sample("dnll", [(model, cell) for cell in cells])
    # Cells are estimated where the model was run at all, and measured up to looks of their own.
    documents = exact.documents[exact.look <= sample.depth.min()]
    if not np.isin(documents, estimated.documents).all() or not np.isin(estimated.documents, exact.documents).all():
        raise ValueError("estimates and effects come from different documents: pass both from one run")
    x = estimated.of("estimate", [(cell,) for cell in cells])[np.isin(estimated.documents, documents)]
    y = exact.of("dnll", [(model, cell) for cell in cells])
    rho = bootstrapped_spearman(y, x, document_resamples(len(x), config))
    low, high = percentile_interval(rho, config.alpha)
    rank = {"rho": rho[0], "rho_lo": low, "rho_hi": high}
    means = zip(cells, x.mean(axis=0).tolist(), y.mean(axis=0).tolist(), strict=True)
    return {
        "attribution": [
            {"model": model, "cell": cell, "estimate": estimate, "dnll": dnll} for cell, estimate, dnll in means
        ],
        "attribution_rank": {"documents": len(x)}
        | {name: None if np.isnan(value) else float(value) for name, value in rank.items()},
    }

"""Does mass say where the effect is? Dissociation of the two, and their rank correlations.

The pilot split picks the cells, the confirmatory split tests them. Effect is mean dNLL (signed, nats/token),
mass the mean routing weight of the family; both by document, every document weighing the same.
"""

from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from attnres.depth.places import place_kind
from attnres.statistics.cells import MASS_TOLERANCE, MASSES, SLICE, document_means, grid_candidates
from attnres.statistics.config import StatisticsConfig
from attnres.statistics.inference import Floats, adjust_p, bca_interval, sign_flip_p

METRICS = ["mass", "norm_share", "displacement"]
DISSOCIATION_COLUMNS = [
    *("model", "sublayer", "cells", "documents", "mass_cell", "effect_cell"),
    *("mass_diff", "mass_diff_lo", "mass_diff_hi", "mass_p"),
    *("effect_diff", "effect_diff_lo", "effect_diff_hi", "effect_p"),
    *("p", "p_holm", "verdict", "reason", "predicted_by"),
]
SPEARMAN_COLUMNS = [
    *("model", "sublayer", "metric", "cells", "documents"),
    *("rho", "rho_lo", "rho_hi", "predicts"),
    *("over_mass", "over_mass_lo", "over_mass_hi", "over_mass_p"),
]
_ALL = "all"
# Attention and MLP: the family of a model's dissociation tests, whichever of them this job ran.
_SUBLAYER_TESTS = 2
_BOOTSTRAP_STREAM = 3
# Cells that differ by less, as under uniform routing, differ by fp32 rounding: ties in rank.
_TIE_DECIMALS = 7


def _banded(table: pd.DataFrame, intervention: str) -> pd.DataFrame:
    """Rows of an intervention at bands: maps of finer places hold the same routing again."""
    return table[(table["intervention"] == intervention) & (table["band"].map(place_kind) == "band")]


def _measured(
    effects: pd.DataFrame, mass: pd.DataFrame, eligibility: pd.DataFrame, split: str, intervention: str
) -> dict[str, tuple[pd.DataFrame, dict[str, np.ndarray]]]:
    """Per model: its eligible cells that were run, and [documents, cells] of dnll and of each metric."""
    effects, eligibility = (_banded(table, intervention) for table in (effects, eligibility))
    if not (effects["split"] == split).any():
        return {}
    grid = grid_candidates(effects, eligibility)
    grid = grid[grid["eligible"] & grid["ran"]]
    dnll, _ = document_means(effects, ["model", "cell"], ["dnll"], split)
    masses, _ = document_means(mass, ["model", *SLICE], MASSES, split)
    if not dnll.index.equals(masses.index):
        raise ValueError(f"effects and mass of split {split!r} come from different documents: pass both from one run")
    measured = {}
    for model, cells in grid.groupby("model", sort=False):
        keys = pd.MultiIndex.from_frame(cells[["model", *SLICE]])
        values = {name: masses[name][keys].to_numpy() for name in METRICS}
        values["dnll"] = dnll["dnll"][pd.MultiIndex.from_frame(cells[["model", "cell"]])].to_numpy()
        measured[str(model)] = (cells.reset_index(drop=True), values)
    return measured


def spearman_table(
    effects: pd.DataFrame,
    mass: pd.DataFrame,
    eligibility: pd.DataFrame,
    config: StatisticsConfig,
    split: str = "confirm",
    intervention: str = "mask",
) -> pd.DataFrame:
    """Spearman correlation, over eligible cells, of effect with mass, norm-aware share and displacement.

    Intervals are percentile intervals over bootstrapped documents, the same for effect and metric; cells are
    fixed, so an interval speaks of these cells on other documents. Resampling adds noise to the
    means, so intervals lean towards zero. `predicts` says that the lower limit is above zero.

    Args:
        effects: one row per model x cell x window.
        mass: one row per model x slice x window.
        eligibility: one row per model x candidate.
        config: level, resamples and seed.
        split: the split that is read.
        intervention: the intervention whose effect is meant.

    Returns:
        One row per model x ("attn", "mlp", "all") x metric, columns `SPEARMAN_COLUMNS`; rho is NaN with fewer
        than three cells or where effect or metric does not vary.

    Raises:
        ValueError: tables that do not fit each other.
    """
    rows = []
    for model, (cells, values) in _measured(effects, mass, eligibility, split, intervention).items():
        documents = len(values["dnll"])
        resamples = document_resamples(documents, config)
        for sublayer in [*cells["sublayer"].unique(), _ALL]:
            chosen = np.ones(len(cells), dtype=bool) if sublayer == _ALL else (cells["sublayer"] == sublayer).to_numpy()
            of_metric = {
                metric: bootstrapped_spearman(values["dnll"][:, chosen], values[metric][:, chosen], resamples)
                for metric in METRICS
            }
            for metric, rho in of_metric.items():
                low, high = percentile_interval(rho, config.alpha)
                row = (model, sublayer, metric, int(chosen.sum()), documents, rho[0], low, high, bool(low > 0))
                over = rho - of_metric["mass"]
                rows.append(row + ((np.nan,) * 4 if metric == "mass" else percentile_test(over, config.alpha)))
    return pd.DataFrame(rows, columns=SPEARMAN_COLUMNS)


def document_resamples(documents: int, config: StatisticsConfig) -> np.ndarray:
    """How often each document is drawn in each resample: [resamples, documents]."""
    rng = np.random.default_rng([config.seed, _BOOTSTRAP_STREAM])
    return rng.multinomial(documents, np.full(documents, 1 / documents), size=config.bootstrap)


def bootstrapped_spearman(effect: Floats, metric: Floats, resamples: np.ndarray) -> Floats:
    """Spearman of the means of two [documents, cells]: first of all documents, then of each resample.

    `resamples` is what `document_resamples` gives. NaN where one side does not vary, and everywhere with fewer than
    three cells.
    """
    documents, cells = effect.shape
    if cells < 3:
        return np.full(1 + len(resamples), np.nan)
    joint = np.concatenate([effect, metric], axis=1)
    # Resamples must depend neither on how documents are numbered nor on the order of cells, and be one for all metrics.
    joint = joint[np.lexsort(np.sort(effect, axis=1).T)]
    means = np.concatenate([joint.mean(axis=0, keepdims=True), resamples @ joint / documents])
    means = means.round(_TIE_DECIMALS)
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


def percentile_test(values: Floats, alpha: float) -> tuple[float, float, float, float]:
    """A difference of correlations, its percentile interval, and the p of no difference that inverts it.

    `values` are the observed difference and its resamples, as `bootstrapped_spearman` orders them.
    """
    low, high = percentile_interval(values, alpha)
    resampled = values[1:][np.isfinite(values[1:])]
    if not np.isfinite(low):
        return np.nan, np.nan, np.nan, np.nan
    tail = min((resampled <= 0).sum(), (resampled >= 0).sum())
    return float(values[0]), low, high, min(1.0, 2 * (1 + tail) / (1 + len(resampled)))


def which_predicts(spearman: pd.DataFrame, alpha: float, model: str = "attnres") -> dict[str, Any]:
    """Which of mass, norm-aware share and displacement predicts effect, over all cells of a model.

    Returns:
        `statement`, and per metric its `rho`, interval, and the test of its difference from mass. `better` names the
        metrics that were shown to predict better than mass, `worse` those shown to predict worse (Holm over the two).
    """
    rows = spearman[(spearman["model"] == model) & (spearman["sublayer"] == _ALL)].set_index("metric")
    if rows.empty or rows["rho"].isna().all():
        return {"statement": "too few cells to say what predicts effect", "better": [], "worse": []}
    others = [name for name in METRICS if name != "mass" and np.isfinite(rows.loc[name, "over_mass_p"])]
    adjusted = dict(zip(others, adjust_p(rows.loc[others, "over_mass_p"], len(METRICS) - 1), strict=True))
    shown = [name for name in others if adjusted[name] <= alpha]
    better = [name for name in shown if rows.loc[name, "over_mass"] > 0]
    worse = [name for name in shown if rows.loc[name, "over_mass"] < 0]
    names = {"mass": "mass", "norm_share": "norm-aware share", "displacement": "displacement"}
    told = ", ".join(
        f"{names[name]} {row['rho']:+.2f} [{row['rho_lo']:+.2f}, {row['rho_hi']:+.2f}]"
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
    return {
        "statement": f"rank correlation with effect over {int(rows['cells'].iloc[0])} cells: {told}; {verdict}",
        "better": better,
        "worse": worse,
    } | {name: {"over_mass_p_holm": float(adjusted[name])} for name in others}


def dissociation_table(
    effects: pd.DataFrame,
    mass: pd.DataFrame,
    eligibility: pd.DataFrame,
    config: StatisticsConfig,
    intervention: str = "mask",
) -> pd.DataFrame:
    """Per model and sublayer type: is the cell of largest mass the cell of largest effect?

    On the pilot split, `mass_cell` is the eligible cell of largest mass and `effect_cell` that of largest
    dNLL. If they are one: "coincide". Else the confirmatory split has to show both mass(mass_cell) >
    mass(effect_cell) and dnll(effect_cell) > dnll(mass_cell): two one-sided sign-flip tests by document, p
    the larger of the two (an intersection-union test), Holm over the model's two sublayer types;
    "dissociated" if that is at most alpha, else "inconclusive". `predicted_by` names the metrics other than
    mass whose Spearman correlation with effect is above zero (`spearman_table`): where there are any, the
    dissociation is about the metric rather than about routing.

    Args:
        effects: one row per model x cell x window, splits "pilot" and "confirm".
        mass: one row per model x slice x window, the same splits.
        eligibility: one row per model x candidate.
        config: level, resampling and seed.
        intervention: the intervention whose effect is meant.

    Returns:
        One row per model x sublayer type, columns `DISSOCIATION_COLUMNS`; differences and p are NaN where
        nothing was tested, and `reason` says why ("" where the verdict comes from a test).

    Raises:
        ValueError: tables that do not fit each other, or a document in both splits.
    """
    shared = set(effects.loc[effects["split"] == "pilot", "document"]) & set(
        effects.loc[effects["split"] == "confirm", "document"]
    )
    if shared:
        raise ValueError(f"document {min(shared)} is in both the pilot and the confirm split: make the splits disjoint")
    pilot = _measured(effects, mass, eligibility, "pilot", intervention)
    confirm = _measured(effects, mass, eligibility, "confirm", intervention)
    correlations = spearman_table(effects, mass, eligibility, config, "confirm", intervention)
    rows = []
    asked = _banded(eligibility, intervention)[["model", "sublayer"]].drop_duplicates()
    for model, sublayer in asked.itertuples(index=False):
        row: dict[str, object] = {
            "model": model,
            "sublayer": sublayer,
            "cells": 0,
            "verdict": "inconclusive",
            "reason": "",
        }
        rows.append(row)
        predicting = correlations[
            (correlations["model"] == model) & (correlations["sublayer"] == sublayer) & correlations["predicts"]
        ]
        row["predicted_by"] = ", ".join(name for name in predicting["metric"] if name != "mass")
        if model not in pilot or model not in confirm:
            row["reason"] = "no effects in the pilot or in the confirm split"
            continue
        cells, picked = pilot[model]
        tested_cells, tested = confirm[model]
        if list(cells["cell"]) != list(tested_cells["cell"]):
            raise ValueError(f"pilot and confirm split of {model} hold different cells: run the same grid on both")
        of_sublayer = np.flatnonzero(cells["sublayer"] == sublayer)
        row |= {"cells": len(of_sublayer), "documents": len(tested["dnll"])}
        row |= _dissociation(cells["cell"].to_numpy(), of_sublayer, picked, tested, config)
    table = pd.DataFrame(rows).reindex(columns=DISSOCIATION_COLUMNS)
    for _, tests in table[table["p"].notna()].groupby("model"):
        table.loc[tests.index, "p_holm"] = adjust_p(tests["p"].to_numpy(dtype=np.float64), _SUBLAYER_TESTS)
    table.loc[table["p_holm"] <= config.alpha, "verdict"] = "dissociated"
    return table


def pick_cells(mass: Floats, effect: Floats) -> tuple[int, int] | None:
    """The cell of largest mass and that of largest effect, from means [cells] on the pilot split.

    Masses that differ by rounding only are equal: the effect is then in a cell of largest mass. None where no cell
    has a positive effect.
    """
    if effect.max() <= 10.0**-_TIE_DECIMALS:
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


def _dissociation(
    names: np.ndarray,
    of_sublayer: np.ndarray,
    pilot: dict[str, np.ndarray],
    confirm: dict[str, np.ndarray],
    config: StatisticsConfig,
) -> dict[str, object]:
    """Cells picked on pilot values and, where they differ, the tests on confirm values."""
    if len(of_sublayer) < 2:
        return {"reason": "fewer than two eligible cells"}
    picks = pick_cells(*(pilot[name][:, of_sublayer].mean(axis=0) for name in ("mass", "dnll")))
    if picks is None:
        return {"reason": "no cell has a positive effect on the pilot split"}
    by_mass, by_effect = (int(of_sublayer[pick]) for pick in picks)
    picked = {"mass_cell": names[by_mass], "effect_cell": names[by_effect]}
    if by_mass == by_effect:
        reason = "one cell has the largest mass and the largest effect on the pilot split"
        return picked | {"verdict": "coincide", "reason": reason}
    differences = paired_differences(confirm["mass"], confirm["dnll"], by_mass, by_effect)
    low, high = bca_interval(differences, config.bootstrap, 1 - config.alpha, config.seed)
    p = sign_flip_p(differences, config.sign_flips, config.seed, "greater")
    for column, name in enumerate(("mass", "effect")):
        picked |= {f"{name}_diff": differences[:, column].mean(), f"{name}_p": p[column]}
        picked |= {f"{name}_diff_lo": low[column], f"{name}_diff_hi": high[column]}
    return picked | {"p": p.max()}


def against_exact(
    estimates: pd.DataFrame, effects: pd.DataFrame, config: StatisticsConfig, split: str = "confirm"
) -> dict[str, Any]:
    """How estimates of effects from gradients stand to the exact effects of the same cells.

    Args:
        estimates: one row per cell x window of one model, `estimate` in nats/token.
        effects: one row per model x cell x window.
        config: level, resamples and seed.
        split: the split that is read.

    Returns:
        `attribution`, a row per cell with its `model`, mean `estimate` and exact mean `dnll` in nats/token; and
        `attribution_rank`, Spearman's `rho` over them with `rho_lo` and `rho_hi`, a percentile interval over
        `documents` (None where there is none).
    """
    cells = list(dict.fromkeys(estimates["cell"]))
    exact = effects[effects["model"].isin(estimates["model"]) & effects["cell"].isin(cells)]
    estimated, _ = document_means(estimates, ["cell"], ["estimate"], split)
    measured, _ = document_means(exact, ["cell"], ["dnll"], split)
    if not estimated.index.equals(measured.index):
        raise ValueError("estimates and effects come from different documents: pass both from one run")
    x, y = estimated["estimate"][cells].to_numpy(), measured["dnll"][cells].to_numpy()
    rho = bootstrapped_spearman(y, x, document_resamples(len(x), config))
    values = (rho[0], *percentile_interval(rho, config.alpha))
    told = [None if np.isnan(value) else float(value) for value in values]
    means = zip(cells, x.mean(axis=0).tolist(), y.mean(axis=0).tolist(), strict=True)
    model = str(estimates["model"].iloc[0])
    return {
        "attribution": [
            {"model": model, "cell": cell, "estimate": estimate, "dnll": dnll} for cell, estimate, dnll in means
        ],
        "attribution_rank": {"documents": len(x)} | dict(zip(("rho", "rho_lo", "rho_hi"), told, strict=True)),
    }

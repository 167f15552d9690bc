"""How much of an effect comes back when a family's clean vectors are put back: cells with a `rescue`."""

import warnings

import numpy as np
import pandas as pd
from scipy import stats

from attnres.statistics.config import StatisticsConfig
from attnres.statistics.design import Design
from attnres.statistics.inference import Floats, interval
from attnres.tables import columns
from attnres.tables.names import RESCUE, Split

_STREAM = 5
_NO_EFFECT = "the effect without the rescue is not above zero"
_NOT_RUN = "the cell without the rescue was not run"


def rescue_table(design: Design, config: StatisticsConfig) -> pd.DataFrame:
    """The share of an effect that a rescue takes back: the table `rescues.csv`.

    `1 - dNLL(with) / dNLL(without)`, of means over confirmatory documents, with a BCa interval (percentile where BCa is
    undefined) that draws documents for both. Where the interval of the effect without the rescue reaches zero, no share
    is given: it would be a quotient by nothing.

    Args:
        design: the confirmatory split is read.
        config: resamples, level and seed.

    Returns:
        One row per model x eligible cell with a rescue, columns `columns.RESCUES`.
    """
    tested = design.tested
    ran = set(zip(tested["model"], tested["cell"], strict=True))
    rows = []
    for model, cell in zip(tested["model"], tested["cell"], strict=True):
        members = str(cell).split("+")
        left = [member for member in members if not member.startswith(f"{RESCUE}:")]
        if len(left) == len(members) or not left:
            continue
        row: dict[str, object] = {"model": model, "cell": cell, "without": "+".join(left)}
        if (model, row["without"]) in ran:
            effects = design.effects[Split.CONFIRM].of("dnll", [(model, cell), (model, "+".join(left))])
            row |= _recovered(effects, config)
        else:
            row["reason"] = _NOT_RUN
        rows.append(row)
    return pd.DataFrame(rows, columns=columns.RESCUES.names)


def _recovered(effects: Floats, config: StatisticsConfig) -> dict[str, object]:
    """A row's numbers, from the effects with and without the rescue [documents, 2]."""
    with_rescue, without = effects.mean(axis=0)
    row: dict[str, object] = {"documents": len(effects), "dnll": with_rescue, "dnll_without": without}
    if interval(effects[:, 1:], config)[0][0] <= 0:
        return row | {"reason": _NO_EFFECT}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy warns where BCa is degenerate: handled below
        drawn = stats.bootstrap(
            (effects[:, 0], effects[:, 1]),
            lambda one, other, axis=-1: 1 - one.mean(axis) / other.mean(axis),
            paired=True,
            vectorized=True,
            n_resamples=config.bootstrap,
            confidence_level=1 - config.alpha,
            method="BCa",
            rng=np.random.default_rng([config.seed, _STREAM]),
        )
    low, high = drawn.confidence_interval
    if np.isnan(low) or np.isnan(high):
        low, high = np.quantile(drawn.bootstrap_distribution, [config.alpha / 2, 1 - config.alpha / 2])
    return row | {"recovered": 1 - with_rescue / without, "recovered_lo": low, "recovered_hi": high, "reason": ""}

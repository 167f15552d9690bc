"""The table of contrasts: what the trained model has more of than each other model, in effect and in mass."""

import numpy as np
import pandas as pd

from attnres.statistics.cells import MASS_TOLERANCE
from attnres.statistics.config import StatisticsConfig
from attnres.statistics.design import OF_EFFECT, OF_MASS, Design, units
from attnres.statistics.verdicts import correct, effect_verdicts, families, mass_verdicts
from attnres.tables import columns
from attnres.tables.names import Measure, Model, Split

_MASS = ["mass_diff", "mass_diff_lo", "mass_diff_hi", "mass_p"]


def contrast_table(design: Design, config: StatisticsConfig, trained: str = Model.TRAINED) -> pd.DataFrame:
    """Paired contrasts of dNLL, and of mass, trained model less baseline, with every other model in turn: the table
    `contrasts.csv`.

    Windows are paired, then averaged by document. Each baseline has its own families, as in `cell_table`, of the
    cells eligible in both models; effect and mass are judged separately, because what was learned of one may not show
    in the other. Verdicts on effect, in this order: "equivalent" if TOST passes the margin, "trained larger" or
    "baseline larger" (of signed dNLL) if the adjusted p is at most alpha, else "inconclusive". Verdicts on mass:
    "equal" if no document differs by more than rounding, else the last three.

    Args:
        design: without mass, the columns of mass are empty.

    Returns:
        One row per baseline x cell that is eligible in both and was run on both, columns `columns.CONTRASTS`;
        no rows where there is no baseline.

    Raises:
        ValueError: the trained model is missing.
        ConfigError: as `cell_table`.
    """
    models = list(design.grid["model"].unique())
    if trained not in models:
        raise ValueError(f"trained model {trained!r} is not in the table, which has {models}: pass one of these names")
    tables = [_against(design, config, trained, model) for model in models if model != trained]
    kept = [table for table in tables if len(table)] or [pd.DataFrame(columns=columns.CONTRASTS.names)]
    return pd.concat(kept, ignore_index=True).astype({"family_size": "Int64", "looks": "Int64"})


def _against(design: Design, config: StatisticsConfig, trained: str, baseline: str) -> pd.DataFrame:
    """The contrasts with one baseline."""
    grid = design.grid
    other = grid.loc[grid["model"] == baseline, ["cell", "eligible", "ran"]]
    pairs = grid[grid["model"] == trained].merge(other, on="cell", suffixes=("", "_other"))
    pairs["eligible"] &= pairs["eligible_other"]
    pairs["ran"] &= pairs["ran_other"]
    corrections = list(families(pairs, config))
    cells = pairs[pairs["eligible"] & pairs["ran"]]
    if len(cells) == 0:
        return pd.DataFrame(columns=columns.CONTRASTS.names)
    effects = design.effects[Split.CONFIRM]
    ours, theirs = (effects.sample("dnll", units(cells.assign(model=name), OF_EFFECT)) for name in (trained, baseline))
    difference = ours.minus(theirs)
    low, high = difference.interval(config)
    table = cells.assign(
        baseline=baseline,
        documents=difference.documents,
        windows=effects.windows_of(difference),
        looks=difference.depth,
        diff=difference.mean(),
        diff_lo=low,
        diff_hi=high,
        p=difference.sign_flip_p(config),
        tost_p=difference.equivalence_p(config.margin),
        trained_dnll=ours.where(difference).mean(),
        baseline_dnll=theirs.where(difference).mean(),
        correction="",
    )
    of_mass = Split.CONFIRM in design.mass
    if of_mass:
        table = table.join(_mass_differences(table, design, config, baseline).reindex(columns=_MASS))
    for family in corrections:
        correct(table, family, ["p", "mass_p"] if of_mass else ["p"])
    table = table.reindex(columns=columns.CONTRASTS.names)
    table["verdict"] = effect_verdicts(table, config.alpha)
    if of_mass:
        table["mass_verdict"] = mass_verdicts(table, config.alpha)
    return table


def _mass_differences(table: pd.DataFrame, design: Design, config: StatisticsConfig, baseline: str) -> pd.DataFrame:
    """The paired difference of the mass of each cell's slice, where both models have one."""
    mass = design.mass[Split.CONFIRM]
    pairs = list(zip(units(table, OF_MASS), units(table.assign(model=baseline), OF_MASS), strict=True))
    there = [place for place, pair in enumerate(pairs) if set(pair) <= mass.units.keys()]
    rows = pd.DataFrame(index=table.index[there])
    if there:
        sides = zip(*(pairs[place] for place in there), strict=True)
        ours, theirs = (mass.sample(Measure.MASS, side) for side in sides)
        difference = ours.minus(theirs)
        # A wrap's schedule and weights that were learned to equal it differ by rounding, which is no difference.
        alike = np.nanmax(np.abs(difference.values), axis=0) <= MASS_TOLERANCE
        difference = difference.with_values(np.where(alike & ~np.isnan(difference.values), 0.0, difference.values))
        rows["mass_diff"] = difference.mean()
        rows["mass_diff_lo"], rows["mass_diff_hi"] = difference.interval(config)
        rows["mass_p"] = difference.sign_flip_p(config)
    return rows

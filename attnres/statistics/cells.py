"""The table of cells: each cell's effect and mass with their intervals, tests and verdict."""

import numpy as np
import pandas as pd

from attnres.depth.places import WHOLE_READ
from attnres.statistics.config import StatisticsConfig
from attnres.statistics.design import EFFECT_MEASURES, MASS_MEASURES, OF_EFFECT, OF_MASS, Design, units
from attnres.statistics.sample_size import documents_needed
from attnres.statistics.verdicts import adjusted, cell_verdicts, correct, families
from attnres.tables import columns
from attnres.tables.names import Measure, Split, Verdict

# A wrap's uniform routing equals |F| / S to this precision only, and that is not an excess.
MASS_TOLERANCE = 1e-6


def cell_table(design: Design, config: StatisticsConfig) -> pd.DataFrame:
    """Statistics and verdict of each cell: the table `cells.csv`.

    Verdicts are those of `cell_verdicts`, and "excluded"; an inconclusive cell has `documents_needed`. Cells at bands
    are corrected by Holm, within a model and an intervention, over the preregistered grid; maps of layers, blocks or
    reads by Benjamini-Hochberg, within a model, an intervention and a kind of place (`correction` says which, and
    `p_holm` or `p_fdr` holds it; see `families`). Candidates that are eligible but were not run (part of a grid) have
    no row.

    Returns:
        One row per model x candidate, columns `columns.CELLS`; `appreciable` says that the lower limit of the mass
        exceeds its uniform share |F| / S. No row depends on which other cells are there, except through the size of
        its family.

    Raises:
        ValueError: a cell without effects or mass.
        ConfigError: a grid larger than the flips can resolve, or smaller than what was tested.
    """
    grid = design.grid.join(_tested(design, config)) if len(design.tested) else design.grid
    grid = grid[~grid["eligible"] | grid["ran"]]
    grid = _with_mass(grid, design, config).reindex(columns=columns.CELLS.names)
    verdicts = cell_verdicts(
        grid["tost_p"], grid["kl_upper_p"], adjusted(grid, "p"), grid["kl_lower_holm"].fillna(grid["kl_lower_fdr"]),
        config.alpha,
    )  # fmt: skip
    grid["verdict"] = np.where(grid["eligible"].to_numpy(dtype=bool), verdicts, Verdict.EXCLUDED)
    grid["correction"] = grid["correction"].fillna("")
    undecided = (grid["verdict"] == Verdict.INCONCLUSIVE) & np.isfinite(grid["documents_needed"])
    grid["documents_needed"] = grid["documents_needed"].where(undecided).astype("Int64")
    return grid.astype(dict.fromkeys(("documents", "windows", "family_size", "looks"), "Int64")).reset_index(drop=True)


def _tested(design: Design, config: StatisticsConfig) -> pd.DataFrame:
    """What was tested of the effect of each cell, with the index of the grid."""
    tested, effects = design.tested, design.effects[Split.CONFIRM]
    dnll, kl, flips = (effects.sample(measure, units(tested, OF_EFFECT)) for measure in EFFECT_MEASURES)
    measured = {"documents": dnll.documents, "windows": effects.windows_of(dnll), "looks": dnll.depth}
    table = pd.DataFrame(measured, index=tested.index)
    table["dnll"], table["kl"], table["flips"] = dnll.mean(), kl.mean(), flips.mean()
    table["dnll_lo"], table["dnll_hi"] = dnll.interval(config)
    table["kl_lo"], table["kl_hi"] = kl.interval(config)
    table["p"] = dnll.sign_flip_p(config)
    table = table.assign(
        tost_p=dnll.equivalence_p(config.margin),
        kl_upper_p=kl.one_sided_p(config.margin, "less"),
        kl_lower_p=kl.one_sided_p(config.margin, "greater"),
        correction="",
    )
    place = pd.Series(range(len(table)), index=table.index)
    for _, rows in design.grid.groupby("model", sort=False):
        for family in families(rows, config):
            if len(family.rows):
                correct(table, family, ["p", "kl_lower_p"])
                mine = place[family.rows].to_numpy()
                for row in mine if len(set(dnll.depth[mine])) > 1 else [mine]:
                    of, look = np.atleast_1d(row), int(dnll.depth[row].max())
                    needed = documents_needed(dnll.first(look, of), kl.first(look, of), family.size, config)
                    table.loc[table.index[of], "documents_needed"] = needed
    return table.rename(columns={"kl_lower_p_holm": "kl_lower_holm", "kl_lower_p_fdr": "kl_lower_fdr"})


def _with_mass(grid: pd.DataFrame, design: Design, config: StatisticsConfig) -> pd.DataFrame:
    """`grid` with the mass of each cell's slice; NaN, and not appreciable, where an excluded cell has none."""
    bounded = [measure.value for measure in Measure]
    if Split.CONFIRM in design.mass:
        mass = design.mass[Split.CONFIRM]
        summary = pd.DataFrame(list(mass.units), columns=OF_MASS)
        for measure in MASS_MEASURES:
            by_document = mass.sample(measure, mass.units)
            summary[measure] = by_document.mean()
            if measure in bounded:
                summary[f"{measure}_lo"], summary[f"{measure}_hi"] = by_document.interval(config)
    else:
        limits = [f"{measure}_{side}" for measure in bounded for side in ("lo", "hi")]
        summary = pd.DataFrame(columns=[*OF_MASS, *MASS_MEASURES, *limits])
    grid = grid.merge(summary, how="left", on=OF_MASS)
    # What is done to a whole read, or to several slices at once, has no mass of its own.
    of_family = (grid["family"] != WHOLE_READ) & ~grid["intervention"].str.contains("+", regex=False)
    lacking = grid[grid["eligible"] & of_family & grid["mass"].isna()]
    if len(lacking):
        row = lacking.iloc[0]
        raise ValueError(
            f"no mass of {row['cell']} in {row['model']}: pass the mass of the run that measured its effect"
        )
    grid["uniform_excess"] = grid["mass"] - grid["uniform_share"]
    grid["appreciable"] = (grid["mass_lo"] - grid["uniform_share"]) > MASS_TOLERANCE
    return grid

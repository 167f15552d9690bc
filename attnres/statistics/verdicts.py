"""Which word follows from which p: families of tests, their correction, and the verdicts of every table.

`negligible`, the verdict of no effect, needs both: dNLL equivalent to zero within the margin, and KL below it. The
margin is `statistics.margin`, the level `statistics.alpha` (`conf/statistics/default.yaml`). A cell is `excluded` where
`eligibility.csv` says that it cannot be judged: by the depth plan, or for want of what the pilot split has to give.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from attnres.errors import ConfigError
from attnres.statistics.config import StatisticsConfig
from attnres.statistics.inference import adjust_p
from attnres.tables.names import ContrastVerdict, MotifVerdict, Verdict

Correction = Literal["holm", "fdr_bh"]
# The column `matched` of a motif: its control ran, did not run, or (any other word) cannot be run, and why.
RUN, NOT_RUN = "run", "not run"
Words = NDArray[np.str_]


@dataclass(frozen=True)
class Family:
    """Tests that are corrected together: an intervention at one kind of place, within one model.

    Attributes:
        rows: index of the rows that were tested.
        size: candidates less those excluded; rows may be fewer where other jobs run the rest.
        correction: "holm" over bands, and over compositions, which are named singly; "fdr_bh" over maps of finer
            places.
    """

    rows: pd.Index
    size: int
    correction: Correction


def families(grid: pd.DataFrame, config: StatisticsConfig) -> Iterator[Family]:
    """Families of tests within one model.

    Where the preregistered grid has more candidates than are listed here, because other jobs run them, each family is
    taken to have all of those too, which can only make the correction stricter.

    Args:
        grid: the model's candidates, with `eligible`, `ran` and `kind`.
        config: `grid_cells`, and flips that must resolve the family.

    Raises:
        ConfigError: a grid larger than the flips can resolve, or smaller than what is listed.
    """
    unlisted = config.grid_cells - len(grid) if config.grid_cells else 0
    if unlisted < 0:
        raise ConfigError(
            f"statistics.grid_cells={config.grid_cells}, but {len(grid)} candidates are listed: set it to those of the "
            "whole preregistered grid, or to null"
        )
    for (_, kind), rows in grid.groupby(["intervention", "kind"], sort=False):
        tested = rows.index[rows["eligible"] & rows["ran"]]
        size = len(rows) + unlisted - int((~rows["eligible"]).sum())
        config.require_resolution(max(size, 1))
        yield Family(tested, size, "holm" if kind in ("band", "composition") else "fdr_bh")


def correct(table: pd.DataFrame, family: Family, names: list[str]) -> None:
    """Writes a family's size, its correction, and the adjusted p of the columns `names` as `<name>_holm` or
    `<name>_fdr`; an empty p is no test.
    """
    rows = family.rows
    table.loc[rows, "family_size"], table.loc[rows, "correction"] = family.size, family.correction
    for name in names:
        tested = rows[table.loc[rows, name].notna()]
        adjusted = adjust_p(table.loc[tested, name], family.size, family.correction)
        table.loc[tested, f"{name}_{family.correction.removesuffix('_bh')}"] = adjusted


def adjusted(table: pd.DataFrame, name: str) -> pd.Series:
    """The adjusted p of the column `name`: of the two corrections, each row has one."""
    return table[f"{name}_holm"].fillna(table[f"{name}_fdr"])


def cell_verdicts(
    tost_p: ArrayLike, kl_upper_p: ArrayLike, p_adjusted: ArrayLike, kl_lower_adjusted: ArrayLike, alpha: float
) -> Words:
    """Verdicts [columns] of eligible cells, in this order.

    "negligible" if TOST on dNLL and the upper test on KL both pass the margin, even where p is small; "causal" if the
    adjusted p of dNLL or of "KL exceeds the margin" is at most alpha; else "inconclusive".
    """
    negligible = (np.asarray(tost_p) <= alpha) & (np.asarray(kl_upper_p) <= alpha)
    causal = (np.asarray(p_adjusted) <= alpha) | (np.asarray(kl_lower_adjusted) <= alpha)
    return np.select([negligible, causal], [Verdict.NEGLIGIBLE, Verdict.CAUSAL], Verdict.INCONCLUSIVE)


def effect_verdicts(contrasts: pd.DataFrame, alpha: float) -> Words:
    """Verdicts on differences of effect: as for cells, what is within the margin is not called a difference."""
    return np.where(contrasts["tost_p"] <= alpha, ContrastVerdict.EQUIVALENT, _larger(contrasts, "diff", "p", alpha))


def mass_verdicts(contrasts: pd.DataFrame, alpha: float) -> Words:
    """Verdicts on differences of mass: "equal" where it is zero in every document, "" where there is no mass."""
    equal = (contrasts[["mass_diff", "mass_diff_lo", "mass_diff_hi"]] == 0).all(axis=1)
    larger = _larger(contrasts, "mass_diff", "mass_p", alpha)
    return np.select([contrasts["mass_p"].isna(), equal], ["", ContrastVerdict.EQUAL], larger)


def _larger(contrasts: pd.DataFrame, difference: str, p: str, alpha: float) -> Words:
    """The side on which `difference` was shown to be larger; "inconclusive" elsewhere."""
    different = adjusted(contrasts, p) <= alpha
    above = contrasts[difference] > 0
    return np.select(
        [different & above, different],
        [ContrastVerdict.TRAINED_LARGER, ContrastVerdict.BASELINE_LARGER],
        ContrastVerdict.INCONCLUSIVE,
    )


def motif_verdicts(motifs: pd.DataFrame, p_adjusted: pd.Series, alpha: float) -> Words:
    """Verdicts of rows of a motif table, given p as corrected."""
    stands_out = motifs["causal"].astype(bool) & (p_adjusted <= alpha)
    controlled = motifs["matched"] == RUN
    return np.select(
        [stands_out & controlled, motifs["ruled_out"].astype(bool), stands_out],
        [MotifVerdict.MOTIF, MotifVerdict.NO_MOTIF, MotifVerdict.UNCONTROLLED],
        MotifVerdict.INCONCLUSIVE,
    )

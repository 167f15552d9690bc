"""The probe's statistics for a table that no probe made: units x components of one effect, in families.

A unit (document, prompt, sample) is what resampling resamples: the rows of a unit and a component are averaged first,
because they are not independent, and units weigh the same. Every component of a group is measured on the same units.
Tests, corrections and the order of verdicts are those of `cell_table`: the same values give the same digits.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import norm

from attnres.errors import ConfigError, DataError
from attnres.statistics.config import StatisticsConfig
from attnres.statistics.inference import Floats, adjust_p, interval, is_constant, margin_tests, sign_flip_p
from attnres.statistics.sample_size import documents_needed
from attnres.statistics.verdicts import cell_verdicts
from attnres.tables import columns
from attnres.tables.foreign import NUMBERS, Foreign
from attnres.tables.names import Shown, Verdict


@dataclass(frozen=True)
class Family:
    """Components that are corrected together, averaged by unit.

    Attributes:
        group: its name; empty where the table has no groups.
        components: their names, as they come in the table.
        rows: rows of the table per component.
        values: role -> means [units, components]; of `control`, NaN in the columns of components without one.
    """

    group: str
    components: list[str]
    rows: int
    values: dict[str, Floats]


def families(table: Foreign) -> Iterator[Family]:
    """The families of a table, in the order in which they come.

    Raises:
        DataError: a group of one unit, or a component that lacks a unit or some of its rows.
    """
    rows = table.rows if "group" in table.rows else table.rows.assign(group="")
    for group, listed in rows.groupby("group", sort=False):
        measures = [role for role in NUMBERS if role in listed]
        where = f"{table.path}: " + (f"group {group}: " if group else "")
        counts = listed.pivot_table(index="unit", columns="component", values="effect", aggfunc="count", sort=False)
        if len(counts) < 2:
            raise DataError(f"{where}one unit ({counts.index[0]}), and statistics by unit need at least 2: --unit")
        # What the others have of a unit is what each must have.
        expected = counts.max(axis=1)
        lacking = counts.fillna(0).ne(expected, axis=0)
        if lacking.to_numpy().any():
            component = lacking.any().idxmax()
            unit = lacking[component].idxmax()
            found = int(counts.fillna(0).loc[unit, component])
            raise DataError(
                f"{where}component {component} has {found} rows of unit {unit}, another one has "
                f"{int(expected[unit])}: measure every component on the same rows, or leave that unit out"
            )
        # Sorted, so that sums do not depend on the order of rows.
        ordered = listed.sort_values(["component", "unit", *measures], kind="stable")
        means = ordered.groupby(["unit", "component"], sort=False)[measures].mean().unstack("component")
        means = means.loc[sorted(means.index, key=_unit_order(means.index))]
        components = list(dict.fromkeys(listed["component"]))
        yield Family(
            str(group),
            components,
            len(listed) // len(components),
            # The columns are contiguous: sums over units do not depend on the other components.
            {role: np.ascontiguousarray(means[role][components].to_numpy().T).T for role in measures},
        )


def _unit_order(units: pd.Index) -> type[int] | None:
    """Whole numbers in their order, as a probe has its documents; else texts."""
    return int if all(unit.isascii() and unit.isdigit() for unit in units) else None


def component_table(
    table: Foreign,
    config: StatisticsConfig,
    second_margin: float | None = None,
    family_size: int | None = None,
) -> pd.DataFrame:
    """Statistics and verdict of each component: the columns of `columns.COMPONENTS` that the table allows.

    Args:
        table: what was measured.
        config: margin in the unit of the effect, level, flips, resamples, seed, power.
        second_margin: of the second metric, in its unit; that of the effect by default.
        family_size: tests that were planned in each family; those in the table by default.

    Returns:
        One row per group x component, in the order of the table. A component without a control is "not tested" for
        specificity, which changes no verdict.

    Raises:
        DataError: see `families`.
        ConfigError: a family larger than the flips can resolve, or smaller than what was tested.
    """
    judged = [_judged(family, config, second_margin or config.margin, family_size) for family in families(table)]
    cells = pd.concat(judged, ignore_index=True)
    known = [name for name in columns.COMPONENTS.names if name in cells]
    return cells[known if "group" in table.rows else [name for name in known if name != "group"]]


def smallest_p(documents: int, flips: int) -> float:
    """The smallest two-sided p of sign flips: of all patterns two are as extreme as the largest mean can be."""
    return max(2.0 ** (1 - documents), 1 / (1 + flips))


def unresolved(cells: pd.DataFrame, alpha: float) -> pd.DataFrame:
    """Rows of so few documents that no effect, however large, could be found after Holm's correction."""
    return cells[cells["smallest_p"] * cells["family_size"] > alpha]


def _judged(family: Family, config: StatisticsConfig, second_margin: float, family_size: int | None) -> pd.DataFrame:
    effect, size = family.values["effect"], family_size or len(family.components)
    if size < len(family.components):
        where = f"group {family.group}: " if family.group else ""
        raise ConfigError(
            f"{where}--family-size {size}, but {len(family.components)} components are in the table: give the number "
            "of tests that were planned"
        )
    config.require_resolution(size)
    documents, strict = len(effect), config.alpha / size
    # Without a second metric: zero, which is below every margin.
    second = family.values.get("second", np.zeros_like(effect)) * (config.margin / second_margin)
    p, tests = sign_flip_p(effect, config.sign_flips, config.seed), margin_tests(effect, second, config.margin)
    p_holm, second_holm = adjust_p(p, size), adjust_p(tests.kl_lower_p, size)
    verdict = cell_verdicts(tests.tost_p, tests.kl_upper_p, p_holm, second_holm, config.alpha)
    needed = documents_needed(effect, second, size, config)
    table = pd.DataFrame({"group": family.group, "component": family.components, "documents": documents})
    table["rows"], table["effect"] = family.rows, effect.mean(axis=0)
    table["effect_lo"], table["effect_hi"] = _interval(effect, config)
    table["p"], table["p_holm"], table["tost_p"] = p, p_holm, tests.tost_p
    if "second" in family.values:
        table["second"] = family.values["second"].mean(axis=0)
        table["second_lo"], table["second_hi"] = _interval(family.values["second"], config)
        table["second_upper_p"], table["second_lower_p"] = tests.kl_upper_p, tests.kl_lower_p
        table["second_lower_holm"] = second_holm
    if "control" in family.values:
        table = table.join(_over_control(effect, family.values["control"], size, config))
    table["verdict"] = verdict
    open_ = (verdict == Verdict.INCONCLUSIVE) & np.isfinite(needed)
    table["documents_needed"] = pd.Series(needed).where(open_).astype("Int64")
    reach = norm.isf(strict / 2) + norm.ppf(config.power)
    table["detectable"] = reach * effect.std(axis=0, ddof=1) / np.sqrt(documents)
    return table.assign(smallest_p=smallest_p(documents, config.sign_flips), family_size=size)


def _interval(values: Floats, config: StatisticsConfig) -> tuple[Floats, Floats]:
    """`interval`, to the digit that a column has among others: numpy adds up a single column in another order."""
    beside = np.hstack([values, values]) if (~is_constant(values)).sum() == 1 else values
    low, high = interval(beside, config)
    return low[: values.shape[1]], high[: values.shape[1]]


def _over_control(effect: Floats, control: Floats, size: int, config: StatisticsConfig) -> pd.DataFrame:
    """What the effect of each component is over that of its control, one-sided, Holm over the family."""
    tested = np.flatnonzero(~np.isnan(control[0]))
    names = ["control_diff", "control_diff_lo", "control_diff_hi", "control_p", "control_p_holm"]
    table = pd.DataFrame(np.nan, index=range(effect.shape[1]), columns=names)
    table["specificity"] = Shown.NOT_TESTED
    if len(tested):
        difference = (effect - control)[:, tested]
        p = sign_flip_p(difference, config.sign_flips, config.seed, "greater")
        holm = adjust_p(p, size)
        table.loc[tested, names] = np.stack([difference.mean(axis=0), *_interval(difference, config), p, holm], axis=1)
        table.loc[tested, "specificity"] = np.where(holm <= config.alpha, Shown.SHOWN, Shown.NOT_SHOWN)
    return table

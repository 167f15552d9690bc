"""After a look: which cells of which models does an open question still need?

Everything that is judged asks: cells, contrasts with each other model, motifs with their family and control, the
dissociation, and rank correlations up to a look of their own. What none of them needs is measured no further. The
answer is a function of the tables alone: every process of a probe, a resumed one and a later judgement give the same.

Three rules, all of them fixed before any result:

* A cell's verdict stands when no other could follow. "Causal" may still become "negligible", which comes first, until
  the interval of dNLL or of KL lies beyond the margin.
* A comparison is given up when its conditional power under the current trend is below `_GIVE_UP` (stochastic
  curtailment; Lan, Simon and Halperin, Commun. Stat. C 1, 1982): it ends as inconclusive, on fewer documents. That can
  only lose findings. Cells and the study's motifs are never given up: what is close is measured to the end.
* A motif without a matched control is no motif whatever its effect, and is not asked about.
"""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from attnres.errors import DataError
from attnres.statistics.config import StatisticsConfig
from attnres.statistics.design import OF_EFFECT, at_bands, averages, candidates, units
from attnres.statistics.dissociation import in_race
from attnres.statistics.judged import Judged
from attnres.statistics.judgement import judge
from attnres.statistics.looks import Looks
from attnres.statistics.verdicts import RUN
from attnres.tables.columns import SLICE
from attnres.tables.names import (
    MASK,
    MATCHED,
    STUDY_MOTIFS,
    ContrastVerdict,
    DissociationVerdict,
    Model,
    MotifVerdict,
    Split,
    Verdict,
)
from attnres.tables.roles import Roles

# Conditional power below which a comparison is given up.
_GIVE_UP = 0.2
_OF_STUDY = {tuple(place) for _, *place in STUDY_MOTIFS}
# Model -> ids of cells; a model with none is run clean, for what is asked of its mass.
Needed = Mapping[str, Collection[str]]


def open_cells(judged: Judged, config: StatisticsConfig, roles: Roles) -> dict[str, set[str]]:
    """What the next look at the confirmatory documents is needed for.

    Args:
        judged: of everything measured so far.
        config: under which it was judged.
        roles: of the models; the claims read rank correlations of those with trained routing.
    """
    needed: defaultdict[str, set[str]] = defaultdict(set)
    effects = judged.design.effects[Split.CONFIRM]
    reach = _Reach(effects.looks, config)
    cells = judged.cells[judged.cells["eligible"]]
    beyond = _beyond(cells, "dnll", config.margin) | (cells["kl_lo"] > config.margin)
    settled = (cells["verdict"] == Verdict.NEGLIGIBLE) | ((cells["verdict"] == Verdict.CAUSAL) & beyond)
    for row in cells[~settled].itertuples():
        needed[str(row.model)].add(row.cell)
    _contrasts(judged.contrasts, reach, needed)
    _motifs(judged, reach, needed)
    _dissociations(judged.dissociation, reach, needed)
    if int(effects.look.max()) < effects.looks.last_within(config.rank_look):
        for model, cell in units(at_bands(judged.design.tested, MASK), OF_EFFECT):
            if model in (Model.TRAINED, *roles.trained_too):
                needed[model].add(cell)
    return dict(needed)


def _beyond(rows: pd.DataFrame, name: str, margin: float) -> pd.Series:
    """Whether the interval of a column lies beyond the margin on one side."""
    return (rows[f"{name}_lo"] > margin) | (rows[f"{name}_hi"] < -margin)


@dataclass(frozen=True)
class _Reach:
    """Which comparisons all documents may decide."""

    looks: Looks
    config: StatisticsConfig

    def _error(self, row: Any, name: str) -> float:
        """Standard error of a mean, from the half width of its interval."""
        level = self.config.alpha * self.looks.shares[int(row.looks) - 1]
        return (getattr(row, f"{name}_hi") - getattr(row, f"{name}_lo")) / 2 / stats.norm.isf(level / 2)

    def _possible(self, row: Any, error: float, distance: float, tests: float) -> bool:
        """Whether all documents may show a distance from zero, one-sided, as one of so many tests."""
        share = row.documents / self.looks.documents[-1]
        if share >= 1 or not error > 0:
            return False
        quantile = stats.norm.isf(self.config.alpha * self.looks.shares[-1] / tests)
        trend = distance / error / np.sqrt(share)
        return bool(stats.norm.cdf((trend - quantile) / np.sqrt(1 - share)) >= _GIVE_UP)

    def above(self, row: Any, name: str, tests: float, sign: int = 1) -> bool:
        """Whether a mean may be shown to lie above zero; below it with the other sign."""
        return self._possible(row, self._error(row, name), sign * getattr(row, name), tests)

    def differs(self, row: Any, name: str, tests: float) -> bool:
        """Whether a mean may be shown to lie on either side of zero."""
        return self._possible(row, self._error(row, name), abs(getattr(row, name)), 2 * tests)

    def within(self, row: Any, name: str) -> bool:
        """Whether a mean may be shown to lie within the margin."""
        return self._possible(row, self._error(row, name), self.config.margin - abs(getattr(row, name)), 1)


def _contrasts(contrasts: pd.DataFrame, reach: _Reach, needed: defaultdict[str, set[str]]) -> None:
    for row in contrasts.itertuples():
        models, tests = (str(Model.TRAINED), str(row.baseline)), max(1, row.family_size)
        if row.verdict == ContrastVerdict.INCONCLUSIVE and (
            reach.within(row, "diff") or reach.differs(row, "diff", tests)
        ):
            for model in models:
                needed[model].add(row.cell)
        if row.mass_verdict == ContrastVerdict.INCONCLUSIVE and reach.differs(row, "mass_diff", tests):
            for model in models:
                needed[model].update()


def _motifs(judged: Judged, reach: _Reach, needed: defaultdict[str, set[str]]) -> None:
    """A motif that is neither shown nor ruled out is compared with its family elsewhere and with its control."""
    tested = judged.design.tested
    masks = at_bands(tested, MASK)
    controls = tested[tested["intervention"] == MATCHED]
    for row in judged.motifs[judged.motifs["verdict"] == MotifVerdict.INCONCLUSIVE].itertuples():
        if not row.causal or row.matched != RUN:
            continue  # the cell itself is open, or no control could make it a motif
        of_model = masks["model"] == row.model
        both, place = ("elsewhere_diff", "matched_diff"), [getattr(row, name) for name in SLICE]
        shown = all(reach.above(row, name, int(of_model.sum())) for name in both)
        ruled_out = any(reach.above(row, name, 1, -1) for name in both)
        if not shown and not ruled_out and tuple(place) not in _OF_STUDY:
            continue
        needed[str(row.model)].update(masks.loc[of_model & (masks["family"] == row.family), "cell"])
        beside = (controls["model"] == row.model) & (controls[SLICE] == place).all(axis=1)
        needed[str(row.model)].update(controls.loc[beside, "cell"])


def _dissociations(dissociation: pd.DataFrame, reach: _Reach, needed: defaultdict[str, set[str]]) -> None:
    """Two cells that were picked, as long as both orderings may be shown."""
    for row in dissociation.itertuples():
        tested = row.verdict == DissociationVerdict.INCONCLUSIVE and pd.notna(row.p)
        if tested and all(reach.above(row, name, 2) for name in ("mass_diff", "effect_diff")):
            needed[str(row.model)] |= {row.mass_cell, row.effect_cell}


def open_picks(effects: pd.DataFrame, eligibility: pd.DataFrame) -> dict[str, set[str]]:
    """What the next look at the pilot documents is needed for: cells that may still be those of largest effect."""
    needed: defaultdict[str, set[str]] = defaultdict(set)
    rows = at_bands(effects[effects["split"] == Split.PILOT], MASK)
    grid = candidates(rows, eligibility)
    pilot = averages(rows, OF_EFFECT, ["dnll"], Split.PILOT)
    for (model, _), cells in grid[grid["ran"]].groupby(["model", "sublayer"], sort=False):
        there = in_race(pilot.sample("dnll", units(cells, OF_EFFECT)))
        if there.sum() > 1:
            needed[str(model)] |= set(cells["cell"][there])
    return dict(needed)


def needed_at(
    split: Split,
    effects: pd.DataFrame | None,
    mass: pd.DataFrame | None,
    eligibility: pd.DataFrame,
    models: Sequence[Mapping[str, Any]],
    config: StatisticsConfig,
) -> Needed:
    """Which cells the next look at a split measures, in each model.

    Args:
        split: whose look comes next; the pilot's come first.
        effects, mass: measured so far, None before the first look.
        eligibility: one row per model x candidate.
        models: rows of a summary; see `Roles.of`.
        config: with the looks that are registered.
    """
    eligible = eligibility[eligibility["eligible"]]
    if effects is None or split not in set(effects["split"]):
        # Of the pilot split, what a dissociation picks from: masks at bands.
        first = at_bands(eligible, MASK) if split == Split.PILOT else eligible
        return {str(model): set(cells) for model, cells in first.groupby("model", sort=False)["cell"]}
    if split == Split.PILOT:
        return open_picks(effects, eligibility)
    assert mass is not None
    return open_cells(judge(effects, mass, eligibility, config, models), config, Roles.of(models))


def replayed(
    effects: pd.DataFrame,
    mass: pd.DataFrame,
    eligibility: pd.DataFrame,
    models: Sequence[Mapping[str, Any]],
    config: StatisticsConfig,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Effects and mass as one probe of the whole grid would have measured them, from what its members did.

    A member cannot know what the rest of the grid needs, and measures every look.

    Raises:
        DataError: a look that the whole grid needs was not measured.
    """
    kept, clean = effects.iloc[:0], mass[mass["split"] == Split.PILOT]
    for split in (Split.PILOT, Split.CONFIRM):
        rows = effects[effects["split"] == split]
        for look in range(1, int(rows["look"].max() if len(rows) else 0) + 1):
            needed = needed_at(split, kept if len(kept) else None, clean, eligibility, models, config)
            if not needed:
                break
            here = rows[rows["look"] == look]
            there = set(units(here, OF_EFFECT))
            if missing := {(model, cell) for model, cells in needed.items() for cell in cells} - there:
                model, cell = min(missing)
                raise DataError(
                    f"{cell} of {model} lacks look {look} of split {split.value!r}: probe the members with one "
                    "preregistered list of looks"
                )
            chosen = [cell in needed.get(model, ()) for model, cell in units(here, OF_EFFECT)]
            kept = pd.concat([kept, here[chosen]], ignore_index=True)
            if split == Split.CONFIRM:
                runs = mass[(mass["split"] == split) & (mass["look"] == look) & mass["model"].isin(needed)]
                clean = pd.concat([clean, runs], ignore_index=True)
    return _in_order_of(effects, kept), _in_order_of(mass, clean)


def _in_order_of(whole: pd.DataFrame, part: pd.DataFrame) -> pd.DataFrame:
    """The rows of `part`, model by model as in the whole."""
    order = {model: place for place, model in enumerate(whole["model"].unique())}
    return part.sort_values("model", key=lambda column: column.map(order), kind="stable", ignore_index=True)

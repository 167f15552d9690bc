"""What was measured, as every table of verdicts takes it: documents averaged once, beside the grid of candidates.

The unit is the document: a document's windows are averaged first and documents weigh the same however many windows
they have, because windows of one document are not independent. Every model and cell is measured on the same windows,
which makes contrasts between models paired; a table that breaks this is refused, never patched. The pilot split picks,
the confirmatory split tests: what suggested a hypothesis never tests it.

Nothing here depends on the order of rows in `effects` and `mass`, or on how documents are numbered.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from attnres.depth.places import BANDS, place_kind
from attnres.errors import DataError, NumericsError
from attnres.statistics.config import StatisticsConfig
from attnres.statistics.inference import Floats
from attnres.statistics.looks import Looks, Sample
from attnres.tables import columns
from attnres.tables.columns import SLICE
from attnres.tables.names import MASK, Split

EFFECT_MEASURES = columns.EFFECTS.measures
MASS_MEASURES = columns.MASS.measures
OF_EFFECT, OF_MASS = ["model", "cell"], ["model", *SLICE]


@dataclass(frozen=True)
class Averages:
    """Means by document in one split, over each document's windows.

    Attributes:
        documents: their ids, ascending: [documents].
        look: the look at which each came, from 1: [documents].
        windows: how many windows each has: [documents].
        units: what was measured, e.g. (model, cell) -> its row in `values`.
        values: measure -> [units, documents]; NaN at documents of looks behind a unit's last.
        looks: of the split.
    """

    split: Split
    documents: NDArray[np.int64]
    look: NDArray[np.int64]
    windows: NDArray[np.int64]
    units: Mapping[tuple[str, ...], int]
    values: Mapping[str, Floats]
    looks: Looks

    def of(self, measure: str, units: Iterable[tuple[str, ...]], within: int | None = None) -> Floats:
        """Means of some units by document: [documents, units], in their order, at the documents that all of them have.

        Args:
            within: only documents of looks at so many documents.

        Raises:
            ValueError: a unit was not measured in this split.
        """
        sample = self.sample(measure, units)
        last = int(sample.depth.min(initial=len(self.looks.shares)))
        if within is not None:
            last = min(last, self.looks.last_within(within))
        return sample.first(last, np.arange(sample.values.shape[1]))

    def windows_of(self, sample: Sample) -> NDArray[np.int64]:
        """How many windows the documents of each column have: [columns]."""
        return ((self.look[:, None] <= sample.depth) * self.windows[:, None]).sum(axis=0)

    def sample(self, measure: str, units: Iterable[tuple[str, ...]]) -> Sample:
        """Means of some units by document, each up to its last look.

        Raises:
            ValueError: a unit was not measured in this split.
        """
        rows = []
        for unit in units:
            if unit not in self.units:
                raise ValueError(f"no {measure} of {' '.join(unit)} in split {self.split.value!r}: rerun that cell")
            rows.append(self.units[unit])
        # The columns of what is returned are contiguous: sums over documents do not depend on the other units.
        return Sample(self.values[measure][rows].T, self.look, self.looks.shares)


@dataclass(frozen=True)
class Design:
    """The tables of one probe, checked and averaged.

    Attributes:
        grid: one row per model x candidate, model by model, with the columns of `eligibility`, `ran` (effects are
            there) and `kind` (of place). The index is the place in `eligibility`.
        effects: split -> dnll, kl (nats/token) and flips by (model, cell). Of the pilot split, masks at bands alone:
            nothing else is picked there.
        mass: split -> mass and the other measures by (model, family, sublayer, band).
    """

    grid: pd.DataFrame
    effects: Mapping[Split, Averages]
    mass: Mapping[Split, Averages]

    @classmethod
    def of(
        cls,
        effects: pd.DataFrame,
        mass: pd.DataFrame,
        eligibility: pd.DataFrame,
        measures: Sequence[str] = tuple(EFFECT_MEASURES),
        config: StatisticsConfig | None = None,
    ) -> "Design":
        """Checks the tables of a probe and averages them.

        Args:
            effects: one row per model x cell x window, both splits.
            mass: one row per model x slice x window, both splits; empty where mass is not judged.
            eligibility: one row per model x candidate.
            measures: columns of `effects` that are averaged.
            config: the looks that tables with a column `look` were measured in.

        Raises:
            ValueError: tables that do not fit each other, or a document in both splits.
            DataError: fewer than two documents in a split.
            NumericsError: a value is not finite.
        """
        grid = candidates(effects, eligibility)
        of_effects, of_mass = {}, {}
        plan = _plan_of(config)
        if len(effects):
            of_effects[Split.CONFIRM] = averages(effects, OF_EFFECT, measures, Split.CONFIRM, plan)
        if len(mass):
            of_mass[Split.CONFIRM] = averages(mass, OF_MASS, MASS_MEASURES, Split.CONFIRM, plan)
        picked = at_bands(effects[effects["split"] == Split.PILOT], MASK)
        if len(picked) and len(mass):
            of_effects[Split.PILOT] = averages(picked, OF_EFFECT, measures, Split.PILOT)
            of_mass[Split.PILOT] = averages(mass, OF_MASS, MASS_MEASURES, Split.PILOT)
        if Split.PILOT in of_effects:
            shared = np.intersect1d(of_effects[Split.PILOT].documents, of_effects[Split.CONFIRM].documents)
            if len(shared):
                raise ValueError(f"document {shared[0]} is in both the pilot and the confirm split: make them disjoint")
        for split in of_effects.keys() & of_mass.keys():
            measured = set(of_effects[split].documents.tolist())
            # The clean runs of a look may go on where no cell does, for what is asked of mass.
            if not measured <= set(of_mass[split].documents.tolist()) or (
                "look" not in effects and len(measured) < len(of_mass[split].documents)
            ):
                raise ValueError(
                    f"effects and mass of split {split.value!r} come from different documents: pass both from one run"
                )
        return cls(grid, of_effects, of_mass)

    @property
    def tested(self) -> pd.DataFrame:
        """Rows of the grid that are eligible and were run."""
        return self.grid[self.grid["eligible"] & self.grid["ran"]]


def units(rows: pd.DataFrame, names: Sequence[str]) -> list[tuple[str, ...]]:
    """The units of some rows, as `Averages` names them."""
    return list(rows[list(names)].itertuples(index=False, name=None))


def at_bands(table: pd.DataFrame, intervention: str) -> pd.DataFrame:
    """Rows of an intervention at bands: maps of finer places hold the same routing again, compositions several."""
    return table[(table["intervention"] == intervention) & table["band"].isin(BANDS)]


def averages(
    table: pd.DataFrame,
    names: Sequence[str],
    measures: Sequence[str],
    split: Split,
    plan: Looks | None = None,
) -> Averages:
    """Means by document over its windows.

    Args:
        table: tidy, one row per unit x window, with columns `document`, `window`, `split`, the units' and the
            measures', and `look` where they were measured in looks.
        names: columns that together name what was measured, e.g. model and cell.
        plan: the looks of the confirmatory split.

    Raises:
        ValueError: a column is missing, a row is repeated, a split is none, or units differ in their windows, other
            than in how many looks they have.
        NumericsError: a value is not finite.
        DataError: the split has fewer than two documents.
    """
    unit, names, measures = " x ".join(names), list(names), list(measures)
    missing = [name for name in (*names, *measures, "document", "window", "split") if name not in table.columns]
    if missing:
        raise ValueError(f"table of {', '.join(measures)} lacks the columns {missing}: pass the probe's own table")
    for word in table["split"].unique():
        Split(word)
    rows = table[table["split"] == split]
    finite = np.isfinite(rows[measures].to_numpy(dtype=np.float64)).all(axis=1)
    if not finite.all():
        where = ", ".join(str(value) for value in rows.loc[~finite, [*names, "window"]].iloc[0])
        raise NumericsError(
            f"non-finite {'/'.join(measures)} in {(~finite).sum()} rows, first at {where}: check the model"
        )
    if (documents := rows["document"].nunique()) < 2:
        raise DataError(
            f"split {split.value!r} has {documents} document(s) and statistics by document need at least 2: "
            "raise the number of probe documents or the split's fraction"
        )
    number = rows.groupby(names, sort=False).ngroup().to_numpy()
    named = units(rows.iloc[np.unique(number, return_index=True)[1]], names)
    look = rows["look"] if "look" in rows else pd.Series(1, index=rows.index)
    rows = rows[["document", "window", *measures]].assign(unit=number, look=look)
    if rows.duplicated(["unit", "document", "window"]).any():
        raise ValueError(f"repeated rows of one {unit} x window: write each only once")
    # The pivot sorts documents and windows: sums do not depend on the order of rows.
    wide = rows.pivot(index=["document", "window"], columns="unit", values=measures).astype(np.float64)
    came = rows.groupby("document")["look"].agg(["min", "max"])
    at = came["max"].reindex(wide.index.get_level_values("document")).to_numpy()
    there = ~wide[measures[0]].isna().to_numpy()
    last = np.where(there, at[:, None], 0).max(axis=0, initial=0)
    if (came["min"] != came["max"]).any() or not np.array_equal(there, at[:, None] <= last):
        raise ValueError(
            f"not every {unit} of split {split.value!r} was measured on the same windows: rerun the missing ones"
        )
    means = wide.groupby(level="document").mean()
    return Averages(
        split=split,
        documents=means.index.to_numpy(),
        look=came["max"].to_numpy(),
        windows=wide.groupby(level="document").size().to_numpy(),
        units={name: place for place, name in enumerate(named)},
        values={measure: np.ascontiguousarray(means[measure].to_numpy().T) for measure in measures},
        looks=_looks(came["max"].to_numpy(), split, plan if "look" in table else None),
    )


def _plan_of(config: StatisticsConfig | None) -> Looks | None:
    return Looks.of(config.looks, config.spending) if config is not None and config.looks else None


def _looks(look: NDArray[np.int64], split: Split, plan: Looks | None) -> Looks:
    """The plan of a split, where its documents came in its looks.

    Raises:
        DataError: they came in others.
    """
    counts = tuple(int((look <= number).sum()) for number in range(1, int(look.max(initial=1)) + 1))
    if split == Split.PILOT or (plan is None and len(counts) == 1):
        # What is picked on the pilot split is no test: nothing is spent there.
        return Looks(counts, (1.0,) * len(counts))
    if plan is None or counts != plan.documents[: len(counts)]:
        wanted = "none" if plan is None else ", ".join(map(str, plan.documents))
        raise DataError(
            f"the documents of split {split.value!r} came in looks of {', '.join(map(str, counts))}, and those "
            f"registered are {wanted}: judge the tables under their own preregistration"
        )
    return plan


def candidates(effects: pd.DataFrame, eligibility: pd.DataFrame) -> pd.DataFrame:
    """The grid of candidate cells, as `Design.grid` describes it.

    Raises:
        ValueError: effects of a cell that `eligibility` does not list, or of one id with two meanings.
    """
    missing = [name for name in (*OF_EFFECT, "intervention", *SLICE, "eligible") if name not in eligibility]
    if missing:
        raise ValueError(f"eligibility lacks the columns {missing}: pass the probe's own table")
    meaning = ["cell", "intervention", *SLICE]
    measured = effects[["model", *meaning]].drop_duplicates()
    tables = [table[meaning].drop_duplicates() for table in (measured, eligibility)]
    for known in (*tables, pd.concat(tables).drop_duplicates()):
        if known.duplicated("cell").any() or known.duplicated(["intervention", *SLICE]).any():
            raise ValueError(
                "one cell is named in two ways: an id must stand for one intervention, family, sublayer, band"
            )
    ran, listed = set(units(measured, OF_EFFECT)), units(eligibility, OF_EFFECT)
    if len(set(listed)) != len(listed):
        raise ValueError("eligibility repeats a candidate cell: one row per model and cell")
    if unlisted := ran - set(listed):
        raise ValueError(f"effects of {min(unlisted)} but eligibility does not list it: pass both from one run")
    grid = eligibility.reset_index(drop=True).assign(
        eligible=eligibility["eligible"].to_numpy(dtype=bool),
        ran=[unit in ran for unit in listed],
        kind=eligibility["band"].map(place_kind).to_numpy(),
    )
    order = {model: place for place, model in enumerate(grid["model"].unique())}
    return grid.sort_values("model", key=lambda column: column.map(order), kind="stable")

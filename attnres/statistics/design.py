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
from attnres.statistics.inference import Floats
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
        windows: how many windows they have together.
        units: what was measured, e.g. (model, cell) -> its row in `values`.
        values: measure -> [units, documents].
    """

    split: Split
    documents: NDArray[np.int64]
    windows: int
    units: Mapping[tuple[str, ...], int]
    values: Mapping[str, Floats]

    def of(self, measure: str, units: Iterable[tuple[str, ...]]) -> Floats:
        """Means of some units by document: [documents, units], in their order.

        Raises:
            ValueError: a unit was not measured in this split.
        """
        rows = []
        for unit in units:
            if unit not in self.units:
                raise ValueError(f"no {measure} of {' '.join(unit)} in split {self.split.value!r}: rerun that cell")
            rows.append(self.units[unit])
        # The columns of what is returned are contiguous: sums over documents do not depend on the other units.
        return self.values[measure][rows].T


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
    ) -> "Design":
        """Checks the tables of a probe and averages them.

        Args:
            effects: one row per model x cell x window, both splits.
            mass: one row per model x slice x window, both splits; empty where mass is not judged.
            eligibility: one row per model x candidate.
            measures: columns of `effects` that are averaged.

        Raises:
            ValueError: tables that do not fit each other, or a document in both splits.
            DataError: fewer than two documents in a split.
            NumericsError: a value is not finite.
        """
        grid = candidates(effects, eligibility)
        of_effects, of_mass = {}, {}
        if len(effects):
            of_effects[Split.CONFIRM] = averages(effects, OF_EFFECT, measures, Split.CONFIRM)
        if len(mass):
            of_mass[Split.CONFIRM] = averages(mass, OF_MASS, MASS_MEASURES, Split.CONFIRM)
        picked = at_bands(effects[effects["split"] == Split.PILOT], MASK)
        if len(picked) and len(mass):
            of_effects[Split.PILOT] = averages(picked, OF_EFFECT, measures, Split.PILOT)
            of_mass[Split.PILOT] = averages(mass, OF_MASS, MASS_MEASURES, Split.PILOT)
        if Split.PILOT in of_effects:
            shared = np.intersect1d(of_effects[Split.PILOT].documents, of_effects[Split.CONFIRM].documents)
            if len(shared):
                raise ValueError(f"document {shared[0]} is in both the pilot and the confirm split: make them disjoint")
        for split in of_effects.keys() & of_mass.keys():
            if not np.array_equal(of_effects[split].documents, of_mass[split].documents):
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


def averages(table: pd.DataFrame, names: Sequence[str], measures: Sequence[str], split: Split) -> Averages:
    """Means by document over its windows.

    Args:
        table: tidy, one row per unit x window, with columns `document`, `window`, `split`, the units' and the
            measures'.
        names: columns that together name what was measured, e.g. model and cell.

    Raises:
        ValueError: a column is missing, a row is repeated, a split is none, or units differ in their windows.
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
    number = rows.groupby(names, sort=False).ngroup().to_numpy()
    named = units(rows.iloc[np.unique(number, return_index=True)[1]], names)
    rows = rows[["document", "window", *measures]].assign(unit=number)
    if rows.duplicated(["unit", "document", "window"]).any():
        raise ValueError(f"repeated rows of one {unit} x window: write each only once")
    # The pivot sorts documents and windows: sums do not depend on the order of rows.
    wide = rows.pivot(index=["document", "window"], columns="unit", values=measures).astype(np.float64)
    if wide.isna().to_numpy().any():
        raise ValueError(
            f"not every {unit} of split {split.value!r} was measured on the same windows: rerun the missing ones"
        )
    means = wide.groupby(level="document").mean()
    if len(means) < 2:
        raise DataError(
            f"split {split.value!r} has {len(means)} document(s) and statistics by document need at least 2: "
            "raise the number of probe documents or the split's fraction"
        )
    return Averages(
        split=split,
        documents=means.index.to_numpy(),
        windows=len(wide),
        units={name: place for place, name in enumerate(named)},
        values={measure: np.ascontiguousarray(means[measure].to_numpy().T) for measure in measures},
    )


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

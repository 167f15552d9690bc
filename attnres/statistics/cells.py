"""Statistics of the probe: tidy tables of effects and mass in, tables of cells and contrasts out.

The unit is the document: a document's windows are averaged first and documents weigh the same however many
windows they have, because windows of one document are not independent. Design: every model and cell is
measured on the same windows, which makes contrasts between models paired; a table that breaks this is
refused, never patched. Every test reads one split only, "confirm" by default, so that what the pilot split
suggested is tested on documents that did not suggest it.

The result does not depend on the order of rows in `effects` and `mass`, on how documents are numbered, or on
which other cells are there (except through the size of the Holm family). Rows come out in the order of
`eligibility`.
"""

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from attnres.depth.places import place_kind
from attnres.errors import ConfigError, DataError, NumericsError
from attnres.statistics.config import StatisticsConfig
from attnres.statistics.inference import (
    adjust_p,
    bca_interval,
    cell_verdicts,
    documents_needed,
    equivalence_p,
    margin_tests,
    sign_flip_p,
)

__all__ = ["StatisticsConfig", "cell_table", "contrast_table", "document_means", "grid_candidates"]

SLICE = ["family", "sublayer", "band"]
EFFECTS = ["dnll", "kl", "flips"]
MASSES = ["mass", "uniform_share", "norm_share", "displacement"]
CELL_COLUMNS = [
    *("model", "cell", "intervention", *SLICE, "eligible", "reason", "eligible_reads", "mean_sources"),
    *("documents", "windows", "mass", "mass_lo", "mass_hi", "uniform_share", "uniform_excess", "appreciable"),
    *("norm_share", "displacement", "dnll", "dnll_lo", "dnll_hi", "p", "p_holm", "tost_p"),
    *(
        "kl",
        "kl_lo",
        "kl_hi",
        "kl_upper_p",
        "kl_lower_p",
        "kl_lower_holm",
        "flips",
        "verdict",
        "documents_needed",
    ),
    *("family_size", "correction", "p_fdr", "kl_lower_fdr"),
    *("norm_share_lo", "norm_share_hi", "displacement_lo", "displacement_hi"),
]
CONTRAST_COLUMNS = [
    *("baseline", "cell", "intervention", *SLICE, "documents", "windows", "diff", "diff_lo", "diff_hi"),
    *("p", "p_holm", "tost_p", "trained_dnll", "baseline_dnll", "verdict"),
    *("family_size", "correction", "p_fdr"),
    *("mass_diff", "mass_diff_lo", "mass_diff_hi", "mass_p", "mass_p_holm", "mass_p_fdr", "mass_verdict"),
]
_BOUNDED = ["mass", "norm_share", "displacement"]  # those with intervals over documents
# A wrap's uniform routing equals |F| / S to this precision only, and that is not an excess.
MASS_TOLERANCE = 1e-6


def document_means(
    table: pd.DataFrame, units: Sequence[str], values: Sequence[str], split: str
) -> tuple[pd.DataFrame, int]:
    """Means by document over its windows.

    Args:
        table: tidy, one row per unit x window, with columns `document`, `window`, `split`, the units' and the
            values'.
        units: columns that together name what was measured, e.g. model and cell.
        values: columns to average.
        split: the split to read.

    Returns:
        A frame indexed by document with columns (value, *unit), and the number of windows.

    Raises:
        ValueError: a column is missing, a row is repeated, or units differ in their windows.
        NumericsError: a value is not finite.
        DataError: the split has fewer than two documents.
    """
    missing = [name for name in (*units, *values, "document", "window", "split") if name not in table.columns]
    if missing:
        raise ValueError(
            f"table of {', '.join(values)} lacks the columns {missing}: pass the one of the probe's runner"
        )
    rows = table[table["split"] == split]
    finite = np.isfinite(rows[list(values)].to_numpy(dtype=np.float64)).all(axis=1)
    if not finite.all():
        where = ", ".join(str(value) for value in rows.loc[~finite, [*units, "window"]].iloc[0])
        raise NumericsError(
            f"non-finite {'/'.join(values)} in {(~finite).sum()} rows, first at {where}: check the model"
        )
    if rows.duplicated([*units, "document", "window"]).any():
        raise ValueError(f"repeated rows of one {' x '.join(units)} x window: write each only once")
    # The pivot sorts documents and windows: sums do not depend on the order of rows.
    wide = rows.pivot(index=["document", "window"], columns=list(units), values=list(values)).astype(np.float64)
    if wide.isna().to_numpy().any():
        raise ValueError(
            f"not every {' x '.join(units)} of split {split!r} was measured on the same windows: rerun the missing ones"
        )
    means = wide.groupby(level="document").mean()
    if len(means) < 2:
        raise DataError(
            f"split {split!r} has {len(means)} document(s) and statistics by document need at least 2: "
            "raise the number of probe documents or the split's fraction"
        )
    return means, len(wide)


def grid_candidates(effects: pd.DataFrame, eligibility: pd.DataFrame) -> pd.DataFrame:
    """Candidate cells of each model, in the order of `eligibility`, model by model.

    Args:
        effects: tidy effects of every split.
        eligibility: one row per model x candidate: its `cell` id, intervention and slice.

    Returns:
        `eligibility` with `ran` (effects are there).

    Raises:
        ValueError: effects of a cell that `eligibility` does not list, or of one id with two meanings.
    """
    missing = [name for name in ("model", "intervention", "cell", *SLICE, "eligible") if name not in eligibility]
    if missing:
        raise ValueError(f"eligibility lacks the columns {missing}: pass the one of the probe's runner")
    design = [table[["cell", "intervention", *SLICE]].drop_duplicates() for table in (effects, eligibility)]
    for known in (*design, pd.concat(design).drop_duplicates()):
        if known.duplicated("cell").any() or known.duplicated(["intervention", *SLICE]).any():
            raise ValueError(
                "one cell is named in two ways: an id must stand for one intervention, family, sublayer, band"
            )
    measured = set(effects[["model", "cell"]].drop_duplicates().itertuples(index=False, name=None))
    listed = list(zip(eligibility["model"], eligibility["cell"], strict=True))
    if len(set(listed)) != len(listed):
        raise ValueError("eligibility repeats a candidate cell: one row per model and cell")
    unlisted = measured - set(listed)
    if unlisted:
        raise ValueError(f"effects of {sorted(unlisted)[0]} but eligibility does not list it: pass both from one run")
    order = {model: place for place, model in enumerate(eligibility["model"].unique())}
    grid = eligibility.assign(eligible=eligibility["eligible"].astype(bool), ran=[key in measured for key in listed])
    return grid.sort_values("model", key=lambda column: column.map(order), kind="stable", ignore_index=True)


def correction_of(kind: str) -> Literal["holm", "fdr_bh"]:
    """Holm over bands, and over compositions, which are named singly; Benjamini-Hochberg over maps of finer places."""
    return "holm" if kind in ("band", "composition") else "fdr_bh"


def _families(
    grid: pd.DataFrame, config: StatisticsConfig
) -> Iterator[tuple[pd.Index, int, Literal["holm", "fdr_bh"]]]:
    """Families of tests within one model: (rows that were tested, size of the family, correction).

    A family is an intervention at one kind of place. Its size is the number of candidates less those excluded. Where
    the preregistered grid has more candidates than are listed here, because other jobs run them, each family is
    taken to have all of those too, which can only make the correction stricter.

    Args:
        grid: the model's candidates, with `eligible` and `ran`.
        config: `grid_cells`, and flips that must resolve the family.
    """
    unlisted = config.grid_cells - len(grid) if config.grid_cells else 0
    if unlisted < 0:
        raise ConfigError(
            f"statistics.grid_cells={config.grid_cells}, but {len(grid)} candidates are listed: set it to those of the "
            "whole preregistered grid, or to null"
        )
    for (_, kind), rows in grid.groupby(["intervention", grid["band"].map(place_kind)], sort=False):
        tested = rows.index[rows["eligible"] & rows["ran"]]
        size = len(rows) + unlisted - int((~rows["eligible"]).sum())
        config.require_resolution(max(size, 1))
        yield tested, size, correction_of(kind)


def _adjusted(table: pd.DataFrame, here: pd.Index, name: str, size: int, correction: Literal["holm", "fdr_bh"]) -> None:
    """Adds the adjusted p of `name` in the rows `here`, as `<name>_holm` or `<name>_fdr`."""
    table.loc[here, f"{name}_{correction.removesuffix('_bh')}"] = adjust_p(table.loc[here, name], size, correction)


def _interval(values: np.ndarray, config: StatisticsConfig) -> tuple[np.ndarray, np.ndarray]:
    return bca_interval(values, config.bootstrap, 1 - config.alpha, config.seed)


def cell_table(
    effects: pd.DataFrame,
    mass: pd.DataFrame,
    eligibility: pd.DataFrame,
    config: StatisticsConfig,
    split: str = "confirm",
) -> pd.DataFrame:
    """Statistics and verdict of each cell: the table `cells.csv`.

    Verdicts, in this order: "excluded"; "null" if TOST on dNLL and the upper test on KL both pass the margin,
    even where p is small; "causal" if the adjusted p of dNLL or of "KL exceeds the margin" is at most alpha; else
    "inconclusive", with `documents_needed`. Cells at bands are corrected by Holm, within a model and an intervention,
    over the preregistered grid; maps of layers, blocks or reads by Benjamini-Hochberg, within a model, an
    intervention and a kind of place (`correction` says which, and `p_holm` or `p_fdr` holds it; see
    `StatisticsConfig.grid_cells` and `adjust_p`). Candidates that are eligible but were not run (part of a grid) have
    no row.

    Args:
        effects: one row per model x cell x window, both splits; dnll and kl in nats/token.
        mass: one row per model x slice x window.
        eligibility: one row per model x candidate.
        config: margin, level, resampling, size of the grid.
        split: the split that is tested.

    Returns:
        One row per model x candidate, columns `CELL_COLUMNS`; `appreciable` says that the lower limit of the
        mass exceeds its uniform share |F| / S.

    Raises:
        ValueError: tables that do not fit each other.
        ConfigError: a grid larger than the flips can resolve, or smaller than what was tested.
        DataError: fewer than two documents.
        NumericsError: a value is not finite.
    """
    grid = grid_candidates(effects, eligibility)
    tested = grid[grid["eligible"] & grid["ran"]]
    if len(tested):
        means, windows = document_means(effects, ["model", "cell"], EFFECTS, split)
        keys = pd.MultiIndex.from_frame(tested[["model", "cell"]])
        absent = keys.difference(means["dnll"].columns)
        if len(absent):
            raise ValueError(f"no effects of {absent[0]} in split {split!r} but there are in others: rerun that cell")
        dnll, kl = means["dnll"][keys].to_numpy(), means["kl"][keys].to_numpy()
        found = pd.DataFrame({"documents": len(means), "windows": windows}, index=tested.index)
        found["dnll"], found["kl"] = dnll.mean(axis=0), kl.mean(axis=0)
        found["flips"] = means["flips"][keys].to_numpy().mean(axis=0)
        found["dnll_lo"], found["dnll_hi"] = _interval(dnll, config)
        found["kl_lo"], found["kl_hi"] = _interval(kl, config)
        found["p"] = sign_flip_p(dnll, config.sign_flips, config.seed)
        found = found.assign(**margin_tests(dnll, kl, config.margin)._asdict())
        found["correction"] = ""
        place = pd.Series(range(len(found)), index=found.index)
        for _, rows in grid.groupby("model", sort=False):
            for here, size, correction in _families(rows, config):
                if len(here) == 0:
                    continue
                _adjusted(found, here, "p", size, correction)
                _adjusted(found, here, "kl_lower_p", size, correction)
                found.loc[here, "family_size"], found.loc[here, "correction"] = size, correction
                mine = place[here].to_numpy()
                found.loc[here, "documents_needed"] = documents_needed(dnll[:, mine], kl[:, mine], size, config)
        found = found.rename(columns={"kl_lower_p_holm": "kl_lower_holm", "kl_lower_p_fdr": "kl_lower_fdr"})
        grid = grid.join(found)
    grid = grid[~grid["eligible"] | grid["ran"]]
    grid = _with_mass(grid, mass, config, split).reindex(columns=CELL_COLUMNS)
    # Of the two corrections, each row has one.
    adjusted = grid["p_holm"].fillna(grid["p_fdr"]), grid["kl_lower_holm"].fillna(grid["kl_lower_fdr"])
    verdicts = cell_verdicts(grid["tost_p"], grid["kl_upper_p"], *adjusted, config.alpha)
    grid["verdict"] = np.where(grid["eligible"].to_numpy(dtype=bool), verdicts, "excluded")
    grid["correction"] = grid["correction"].fillna("")
    needed = grid["documents_needed"].where((grid["verdict"] == "inconclusive") & np.isfinite(grid["documents_needed"]))
    grid["documents_needed"] = needed.astype("Int64")
    return grid.astype({"documents": "Int64", "windows": "Int64", "family_size": "Int64"}).reset_index(drop=True)


def _with_mass(grid: pd.DataFrame, mass: pd.DataFrame, config: StatisticsConfig, split: str) -> pd.DataFrame:
    """`grid` with the mass of each cell's slice; NaN, and not appreciable, where an excluded cell has
    none."""
    if len(mass) == 0:
        bounds = [f"{name}_{side}" for name in _BOUNDED for side in ("lo", "hi")]
        summary = pd.DataFrame(columns=["model", *SLICE, *MASSES, *bounds])
    else:
        means, _ = document_means(mass, ["model", *SLICE], MASSES, split)
        summary = pd.DataFrame({name: means[name].mean() for name in MASSES})
        for name in _BOUNDED:
            summary[f"{name}_lo"], summary[f"{name}_hi"] = _interval(means[name].to_numpy(), config)
        summary = summary.reset_index()
    grid = grid.merge(summary, how="left", on=["model", *SLICE])
    # What is done to a whole read, or to several slices at once, has no mass of its own.
    of_family = (grid["family"] != "read") & ~grid["intervention"].str.contains("+", regex=False)
    lacking = grid[grid["eligible"] & of_family & grid["mass"].isna()]
    if len(lacking):
        row = lacking.iloc[0]
        raise ValueError(
            f"no mass of {row['cell']} in {row['model']}: pass the mass of the run that measured its effect"
        )
    grid["uniform_excess"] = grid["mass"] - grid["uniform_share"]
    grid["appreciable"] = (grid["mass_lo"] - grid["uniform_share"]) > MASS_TOLERANCE
    return grid


def contrast_table(
    effects: pd.DataFrame,
    eligibility: pd.DataFrame,
    config: StatisticsConfig,
    trained: str = "attnres",
    split: str = "confirm",
    mass: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """Paired contrasts of dNLL, and of mass, trained model less baseline, with every other model in turn: the table
    `contrasts.csv`.

    Windows are paired, then averaged by document. Each baseline has its own families, as in `cell_table`, of the
    cells eligible in both models; effect and mass are judged separately, because what was learned of one may not show
    in the other. Verdicts on effect, in this order (as for cells, what is within the margin is not called a
    difference): "equivalent" if TOST passes the margin, "trained larger" or "baseline larger" (of signed dNLL) if the
    adjusted p is at most alpha, else "inconclusive". Verdicts on mass: "equal" if no document differs by more than
    rounding, else the last three.

    Args:
        effects: one row per model x cell x window, both splits; dnll in nats/token.
        eligibility: one row per model x candidate.
        config: margin, level, resampling, size of the grid.
        trained: name of the trained model.
        split: the split that is tested.
        mass: one row per model x slice x window; None leaves the columns of mass empty.

    Returns:
        One row per baseline x cell that is eligible in both and was run on both, columns `CONTRAST_COLUMNS`;
        no rows where there is no baseline.

    Raises:
        ValueError: the trained model is missing, or windows differ between models.
        ConfigError, DataError, NumericsError: as `cell_table`.
    """
    grid = grid_candidates(effects, eligibility)
    models = list(grid["model"].unique())
    if trained not in models:
        raise ValueError(f"trained model {trained!r} is not in the table, which has {models}: pass one of these names")
    tables = [pd.DataFrame(columns=CONTRAST_COLUMNS)]
    mine = grid[grid["model"] == trained]
    for baseline in (model for model in models if model != trained):
        other = grid.loc[grid["model"] == baseline, ["cell", "eligible", "ran"]]
        pairs = mine.merge(other, on="cell", suffixes=("", "_other"))
        pairs["eligible"] &= pairs["eligible_other"]
        pairs["ran"] &= pairs["ran_other"]
        families = list(_families(pairs, config))
        cells = pairs[pairs["eligible"] & pairs["ran"]]
        if len(cells) == 0:
            continue
        of_pair = effects[effects["model"].isin([trained, baseline]) & effects["cell"].isin(cells["cell"])]
        means, windows = document_means(of_pair, ["model", "cell"], ["dnll"], split)
        ours, theirs = (means["dnll"][name][cells["cell"]].to_numpy() for name in (trained, baseline))
        diff = ours - theirs
        low, high = _interval(diff, config)
        table = cells.assign(
            baseline=baseline,
            documents=len(means),
            windows=windows,
            diff=diff.mean(axis=0),
            diff_lo=low,
            diff_hi=high,
            p=sign_flip_p(diff, config.sign_flips, config.seed),
            tost_p=equivalence_p(diff, config.margin),
            trained_dnll=ours.mean(axis=0),
            baseline_dnll=theirs.mean(axis=0),
            correction="",
        )
        if mass is not None:
            table = _with_mass_contrast(table, mass, trained, baseline, config, split)
        for here, size, correction in families:
            table.loc[here, "family_size"], table.loc[here, "correction"] = size, correction
            _adjusted(table, here, "p", size, correction)
            if mass is not None:
                massive = here[table.loc[here, "mass_p"].notna()]
                _adjusted(table, massive, "mass_p", size, correction)
        table = table.reindex(columns=CONTRAST_COLUMNS)
        equivalent = table["tost_p"] <= config.alpha
        table["verdict"] = np.where(equivalent, "equivalent", _larger(table, "diff", "p", config.alpha))
        if mass is not None:
            equal = (table[["mass_diff", "mass_diff_lo", "mass_diff_hi"]] == 0).all(axis=1)  # in every document
            larger = _larger(table, "mass_diff", "mass_p", config.alpha)
            table["mass_verdict"] = np.select([table["mass_p"].isna(), equal], ["", "equal"], larger)
        tables.append(table)
    table = pd.concat(tables[1:] or tables, ignore_index=True)
    return table.astype({"family_size": "Int64"})


def _larger(table: pd.DataFrame, difference: str, p: str, alpha: float) -> NDArray[np.str_]:
    """The side on which `difference` was shown to be larger; "inconclusive" elsewhere."""
    different = table[f"{p}_holm"].fillna(table[f"{p}_fdr"]) <= alpha
    above = table[difference] > 0
    return np.select([different & above, different], ["trained larger", "baseline larger"], "inconclusive")


def _with_mass_contrast(
    table: pd.DataFrame, mass: pd.DataFrame, trained: str, baseline: str, config: StatisticsConfig, split: str
) -> pd.DataFrame:
    """`table` with the paired difference of the mass of each cell's slice; NaN where a slice has none in both."""
    of_pair = mass[mass["model"].isin([trained, baseline])]
    shared = of_pair[[*SLICE, "model"]].drop_duplicates().groupby(SLICE).size()
    slices = pd.MultiIndex.from_frame(table[SLICE])
    there = slices.isin(shared.index[shared == 2])
    found = pd.DataFrame(index=table.index[there])
    if len(found):
        kept = pd.MultiIndex.from_frame(of_pair[SLICE]).isin(slices[there])
        means, _ = document_means(of_pair[kept], ["model", *SLICE], ["mass"], split)
        difference = (means["mass"][trained][slices[there]] - means["mass"][baseline][slices[there]]).to_numpy()
        # A wrap's schedule and weights that were learned to equal it differ by rounding, which is no difference.
        difference = np.where(np.abs(difference).max(axis=0) <= MASS_TOLERANCE, 0.0, difference)
        found["mass_diff"] = difference.mean(axis=0)
        found["mass_diff_lo"], found["mass_diff_hi"] = _interval(difference, config)
        found["mass_p"] = sign_flip_p(difference, config.sign_flips, config.seed)
    return table.join(found.reindex(columns=["mass_diff", "mass_diff_lo", "mass_diff_hi", "mass_p"]))

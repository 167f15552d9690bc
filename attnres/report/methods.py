"""The paragraph of methods that a paper needs, in sentences: every value is one of the tables or of the summary.

A value that a folder does not hold, because an older version wrote it, takes its clause with it.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd

from attnres.report.tables import Tables
from attnres.report.words import plain
from attnres.tables.names import Split

# Libraries whose versions decide digits, in the order in which they are named; those that no table alone needs.
_LIBRARIES = ("python", "numpy", "scipy", "statsmodels")
_OF_MODELS = ("torch", "transformers")
# Column of a corrected p -> whose method it was.
_METHODS = {"p_holm": "Holm", "p_fdr": "Benjamini and Hochberg"}
_SPLITS = {Split.PILOT: "pilot", Split.CONFIRM: "confirmatory"}


def of_probe(tables: Tables) -> list[str]:
    """The sentences for the report of a probe."""
    summary, statistics = tables.summary, tables.summary["statistics"]
    cells = tables.cells[tables.cells["eligible"]]
    return [
        *_probed(tables, statistics),
        *_tests(statistics, "document", "ΔNLL", "KL", "nat"),
        *_corrections(cells, "intervention"),
        *_looks(statistics),
        *_registered(summary),
        *_seeds(summary, statistics),
        *_made_with(summary["provenance"], (*_LIBRARIES, *_OF_MODELS)),
        *_judged_anew(summary),
    ]


def of_table(summary: Mapping[str, Any], cells: pd.DataFrame) -> list[str]:
    """The sentences for a table that no probe made.

    Args:
        summary: what `attnres.report.any_table` writes beside `cells`.
        cells: columns of `columns.COMPONENTS`.
    """
    statistics, names = summary["statistics"], summary["columns"]
    unit, effect, second = (" ".join(names.get(role, ())) for role in ("unit", "effect", "second"))
    return [
        f"The {effect} of {_said(len(cells))} components was measured on {_range(cells['documents'])} units ({unit}), "
        f"in {_range(cells['rows'])} rows for each component.",
        *_tests(statistics, unit, effect, second, ""),
        *_corrections(cells, ""),
        *_seeds(summary, statistics),
        *_made_with(summary["provenance"], _LIBRARIES),
    ]


def _probed(tables: Tables, statistics: Mapping[str, Any]) -> Iterator[str]:
    windows = tables.effects.drop_duplicates(["window", "split"])
    drawn = {
        split: f"{_said(rows['document'].nunique())} {_SPLITS[split]} documents ({_said(len(rows))} windows)"
        for split in Split
        if len(rows := windows[windows["split"] == split])
    }
    length = statistics.get("window_length")
    tokens = f" of {_said(length)} tokens each" if length else ""
    yield (
        f"Effects are the edited less the clean negative log-likelihood (ΔNLL, nats/token) in "
        f"{_said(len(tables.models))} models, on {' and '.join(drawn.values())}{tokens}."
    )
    if len(drawn) > 1:
        yield "The pilot documents picked hypotheses, and the confirmatory documents alone tested them."


def _tests(statistics: Mapping[str, Any], unit: str, effect: str, second: str, nats: str) -> Iterator[str]:
    """What was done to each mean; `second` may be empty."""
    keys = ("alpha", "sign_flips", "bootstrap", "margin", "power")
    alpha, flips, resamples, margin, power = (_said(statistics.get(key)) for key in keys)
    within = " ".join(filter(None, [margin, nats]))
    below = " ".join(filter(None, [_said(statistics.get("second_margin")) or margin, nats]))
    yield f"The unit of every test is the {unit}: what was measured of one is averaged first."
    if flips:
        yield (
            f"Each mean was tested by two-sided sign flips of the mean corrected for skewness (Hall 1992), with "
            f"{flips} flips and p = (1 + k) / (1 + B)."
        )
    if margin:
        also = f", and a one-sided test shows its {second} to be below {below}" if second else ""
        yield (
            f"A result is negligible where two one-sided tests (TOST) show its {effect} to be within ±{within}{also}."
        )
    if alpha:
        either = f" of {effect}, or of {second} above its margin," if second else ""
        yield f"Else it is causal where the corrected p{either} is at most {alpha}, and inconclusive otherwise."
    if resamples and isinstance(statistics.get("alpha"), float):
        level = plain(100 * (1 - statistics["alpha"]))
        yield f"Intervals are {level}% BCa bootstrap intervals over units, from {resamples} resamples."
    if power:
        yield f"Sample sizes that would decide are computed at a power of {power}."


def _corrections(cells: pd.DataFrame, of: str) -> Iterator[str]:
    """By whose method p was corrected, and over how many tests: "families of 19 to 20 (mask), 2 to 4 (matched) tests".

    Args:
        of: the column by which sizes are told apart; empty for none.
    """
    for column, method in _METHODS.items():
        if column not in cells or cells[column].isna().all():
            continue
        over = ""
        if "family_size" in cells:
            rows = cells[cells[column].notna() & cells["family_size"].notna()]
            parts = rows.groupby(of, sort=False) if of else [("", rows)]
            sizes = [
                f"{_range(part['family_size'])}{f' ({name})' if name else ''}" for name, part in parts if len(part)
            ]
            over = f" over families of {', '.join(sizes)} tests" if sizes else ""
        yield f"p was corrected by the method of {method}{over}."


def _looks(statistics: Mapping[str, Any]) -> Iterator[str]:
    looks = statistics.get("looks")
    if isinstance(looks, list) and looks:
        yield (
            f"Tests were read after {', '.join(map(_said, looks))} documents, with the level spent over these looks "
            f"({_said(statistics.get('spending'))}). What was decided was measured no further, and intervals are valid "
            "at each look."
        )


def _registered(summary: Mapping[str, Any]) -> Iterator[str]:
    digest = _object(summary.get("preregistration")).get("sha256")
    if digest:
        yield f"Cells, margin, splits and seeds were preregistered before any result (sha256 {str(digest)[:12]})."


def _seeds(summary: Mapping[str, Any], statistics: Mapping[str, Any]) -> Iterator[str]:
    of = {"statistics": statistics.get("seed")} | _object(summary["provenance"].get("seeds"))
    for row in summary.get("models", []):
        of[f"training of {row.get('experiment') or row.get('name')}"] = row.get("seed")
    said: dict[str, list[str]] = {}
    for name, seed in of.items():
        if seed is not None:
            said.setdefault(str(seed), []).append(name)
    if said:
        listed = (f"{seed} ({', '.join(names)})" for seed, names in said.items())
        yield f"Seeds: {'; '.join(listed)}."


def _made_with(provenance: Mapping[str, Any], libraries: tuple[str, ...]) -> Iterator[str]:
    # Older summaries, and others' tables, have versions at the top.
    versions = _object(provenance.get("versions")) or provenance
    sha = _commit(provenance.get("git"))
    ours = ["attnres", versions.get("attnres"), f"(commit {sha})" if sha else None]
    others = [f"{name} {versions[name]}" for name in libraries if versions.get(name)]
    yield f"Computed with {', '.join([' '.join(filter(None, ours)), *others])}."


def _judged_anew(summary: Mapping[str, Any]) -> Iterator[str]:
    sha = _commit(summary["judged_anew"].get("git"))
    if sha:
        yield f"Verdicts are of a later version (commit {sha}), from the same measurements."


def _object(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}


def _commit(git: Any) -> str:
    return str((git.get("sha") if isinstance(git, Mapping) else git) or "")[:12]


def _said(value: Any) -> str:
    """A number as a sentence has it; empty for none, and whatever else a file holds as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "" if value is None else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _range(values: pd.Series) -> str:
    low, high = _said(int(values.min())), _said(int(values.max()))
    return low if low == high else f"{low} to {high}"

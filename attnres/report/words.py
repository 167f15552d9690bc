"""The words and the number formats of the report: tables in, sentences out, in plain text.

Nothing here is markup: the HTML template escapes what it is given, and `markdown` does it for report.md.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from attnres.report.figures.plotting import SUBLAYER_NAMES, number, plain
from attnres.report.tables import DISCOVERY, Tables
from attnres.tables.columns import MOTIFS

_SECRET = re.compile(r"(?i)(passw|secret|credential|api_?key|access_?key|^token$|_token$|authorization)")
# Settings of a probe that say which cells and models it measures, and how fast.
_WHICH_CELLS = (
    *("families", "sublayers", "bands", "interventions", "controls", "places", "cells", "grid_cells"),
    *("schedules", "nulls", "batch_size", "cells_per_pass"),
)
_DECIDED = {
    "trained larger": "larger than in",
    "baseline larger": "smaller than in",
    "equivalent": "equivalent to",
}


def cell_name(row: Mapping[str, Any]) -> str:
    """A cell in words: `embedding → early MLP`."""
    sublayer = SUBLAYER_NAMES.get(row["sublayer"], row["sublayer"]) if row["sublayer"] else ""
    return f"{row['family']} → {row['band']} {sublayer}".strip()


def visible(text: object) -> str:
    """Text with nothing in it that a reader cannot see: control characters and marks of direction become spaces."""
    return "".join(c if c.isprintable() or c in "\n\u00a0\u202f" else " " for c in str(text))


def disagreements(contrasts: pd.DataFrame) -> list[tuple[str, dict[str, str]]]:
    """Cells whose decided verdict differs between baselines: (cell in words, {baseline: decided verdict})."""
    found = []
    for _, rows in contrasts.groupby("cell", sort=False):
        decided = rows[rows["verdict"].isin(list(_DECIDED))]
        if decided["verdict"].nunique() > 1:
            pairs = dict(zip(decided["baseline"], decided["verdict"], strict=True))
            found.append((cell_name(decided.iloc[0].to_dict()), pairs))
    return found


def headline(tables: Tables) -> list[str]:
    """The verdict in plain sentences."""
    lines, trained = [], tables.trained
    grid = tables.primary[tables.primary["model"] == trained]
    eligible = grid[grid["eligible"]]
    count = eligible["verdict"].value_counts()
    outcome = ", ".join(f"{count.get(v, 0)} {v}" for v in ("causal", "null", "inconclusive"))
    text = f"{trained}: {len(eligible)} of {len(grid)} cells could be tested: {outcome}."
    if eligible["dnll"].notna().any():
        top = eligible.loc[eligible["dnll"].abs().idxmax()].to_dict()
        size = f"{nats(top['dnll'])} nats/token [{interval(top, 'dnll')}]"
        text += f" The largest effect is {size}, {cell_name(top)}."
    lines.append(text)
    for baseline, rows in tables.primary_contrasts.groupby("baseline", sort=False):
        count = rows["verdict"].value_counts()
        lines.append(
            f"Against {baseline}, over {len(rows)} cells eligible in both: the trained effect is larger in "
            f"{count.get('trained larger', 0)}, smaller in {count.get('baseline larger', 0)}, equivalent in "
            f"{count.get('equivalent', 0)}, undecided in {count.get('inconclusive', 0)}."
        )
    idle = eligible[eligible["appreciable"] & (eligible["verdict"] == "null")]
    names = "; ".join(cell_name(r) for r in idle.to_dict("records"))
    lines.append(
        f"Appreciable mass without a detectable role (null): {names}."
        if names
        else "No cell of the trained model carries appreciable mass and is null."
    )
    for row in tables.summary.get("dissociation", []):
        if row.get("model", trained) != trained:
            continue
        told = {k: row.get(k) or "–" for k in ("sublayer", "largest_mass", "largest_effect", "verdict")}
        lines.append(
            f"In {SUBLAYER_NAMES.get(told['sublayer'], told['sublayer'])} the largest mass is "
            f"{told['largest_mass']}, the largest effect {told['largest_effect']}: {told['verdict']}."
        )
    return lines


def motifs(tables: Tables) -> list[dict[str, Any]]:
    """Rows of the summary's motifs: all of the trained model, and what stands out in the others."""
    rows = [{name: row.get(name) for name in MOTIFS.names} for row in tables.summary["motifs"]]
    return [row for row in rows if row["model"] == tables.trained or row["verdict"] in ("motif", "uncontrolled")]


def compared(claim: Mapping[str, Any]) -> Mapping[str, Any]:
    """A claim's verdict by model, against one without trained routing or in one with; empty where it has none."""
    found = [claim.get(key) for key in ("against", "recurs")]
    return {name: verdict for part in found if isinstance(part, Mapping) for name, verdict in part.items()}


def _inside(value: Any, *keys: str) -> Any:
    """What lies under these keys of nested objects; None where one of them is no object or lacks the key."""
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def warnings(tables: Tables) -> list[str]:
    """What a reader must know before any number: baselines that disagree, a partial grid, a failed check, an
    unverified checkpoint.
    """
    summary, found = tables.summary, []
    clashes = disagreements(tables.against_baselines)
    if clashes:
        shared = tables.against_baselines["cell"].nunique()
        name, verdicts = clashes[0]
        against = " and ".join(f"{_DECIDED[verdict]} {baseline}" for baseline, verdict in verdicts.items())
        found.append(
            f"The baselines disagree on {len(clashes)} of {shared} cells: for example, the trained effect of "
            f"{name} is {against}. What training added can only be read from a baseline that shares the "
            f"trained model's source convention: {', '.join(tables.roles.shared) or 'none of these does'}."
        )
    grid = summary.get("grid", {})
    if grid and not grid.get("complete", True):
        families = ", ".join(map(str, grid.get("families", []))) or "not stated"
        found.append(
            f"This report holds part of the grid: {grid.get('run_cells', '?')} of "
            f"{grid.get('candidate_cells', '?')} candidate cells (families: {families}). Holm's correction "
            f"is over the full preregistered grid. {grid.get('note', '')}".strip()
        )
    looks = [one for one in _rows(tables.preregistration.get("earlier_looks")) if _decisive(one.get("differs"))]
    if looks:
        told = "; ".join(
            f"{one.get('folder', '?')} ({', '.join(f'{k}={v}' for k, v in _decisive(one['differs']).items())})"
            for one in looks
        )
        found.append(
            f"{len(looks)} earlier probe(s) of this checkpoint had results for some of these cells, under other "
            f"settings, when this one was registered: {told}."
        )
    failed = [c for c in summary.get("checks", []) if not c.get("passed")]
    if failed:
        names = "; ".join(f"{c.get('name', '?')} ({c.get('model', '?')})" for c in failed)
        found.append(f"{len(failed)} check(s) failed: {names}. The results below are not to be relied on.")
    for model in summary.get("models", []):
        if model.get("verified") is False:
            found.append(
                f"The checkpoint of {model.get('name', '?')} ({model.get('path', '?')}) was loaded "
                "unverified: it has no manifest of hashes, so nothing shows that its files are those saved."
            )
    base = _inside(summary, "provenance", "hashes", "baseline")
    for model in summary.get("models", []):
        began = _inside(model, "training", "init", "digest")
        if None not in (began, base) and began != base:
            found.append(
                f"{model.get('name', '?')} began from other weights than those of the vanilla baseline "
                f"({began} against {base}): it is no control of the same base."
            )
    seen = set()
    for table in (tables.effects, tables.mass):
        for _, rows in table.groupby("model"):
            seen.add(frozenset(zip(rows["window"], rows["document"], rows["split"], strict=True)))
    if len(seen) > 1:
        found.append("The models were not probed on the same windows: the contrasts below are not paired.")
    return found


def _rows(value: Any) -> list[Mapping[str, Any]]:
    """The objects of a list; none where it is no list."""
    return [row for row in value if isinstance(row, Mapping)] if isinstance(value, list) else []


def _decisive(settings: Any) -> dict[str, Any]:
    """Of the settings that differ between two probes, those that can turn a verdict on one cell."""
    return {k: v for k, v in settings.items() if k not in _WHICH_CELLS} if isinstance(settings, Mapping) else {}


def nats(value: Any) -> str:
    """An effect in nats/token, signed."""
    return number(float(value)) if _is_number(value) else "–"


def interval(row: Mapping[str, Any], name: str) -> str:
    """The confidence interval of column `name`: signed for effects, plain for what cannot be negative."""
    form = nats if name.endswith(("dnll", "diff")) else share
    return f"{form(row[f'{name}_lo'])}, {form(row[f'{name}_hi'])}"


def share(value: Any) -> str:
    """A weight or a share, three significant digits."""
    return plain(float(value)) if _is_number(value) else "–"


def probability(value: Any) -> str:
    """A p-value: three significant digits, and no pretence below one in ten thousand."""
    if not _is_number(value):
        return "–"
    return "<0.0001" if float(value) < 1e-4 else f"{float(value):.3g}"


def adjusted(row: Mapping[str, Any]) -> str:
    """The corrected p of a row: Holm's, or that of Benjamini and Hochberg, which says so, in a map of many places."""
    discovery = next((row[c] for c in DISCOVERY if _is_number(row.get(c))), None)
    if _is_number(row.get("p_holm")) or discovery is None:
        return probability(row.get("p_holm"))
    return f"{probability(discovery)} (BH)"


def count(value: Any) -> str:
    """A whole number with thin separators; other values as they are; an en dash for nothing."""
    if isinstance(value, bool) or value is None or value == "":
        return "–"
    if not _is_number(value):
        return "–" if isinstance(value, float) else str(value)
    return f"{float(value):,.0f}".replace(",", "\u202f") if float(value).is_integer() else f"{float(value):.4g}"


def slug(text: object) -> str:
    """A word that is safe in a file name, an anchor or a class."""
    return re.sub(r"[^a-z0-9]+", "-", str(text).lower()).strip("-")[:40] or "x"


def markdown(text: object) -> str:
    """Text for report.md: one line, no control characters (terminals obey them), no markup."""
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", " ".join(visible(text).split()))


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table whose columns line up in a terminal."""
    grid = [[markdown(v) for v in row] for row in (headings, *rows)]
    widths = [max(3, *(len(row[k]) for row in grid)) for k in range(len(headings))]
    lines = ["| " + " | ".join(v.ljust(w) for v, w in zip(row, widths, strict=True)) + " |" for row in grid]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool) and bool(np.isfinite(value))


def redact(value: Any) -> Any:
    """The same provenance with the values of keys that sound like a secret left out."""
    if isinstance(value, Mapping):
        return {k: "(not shown)" if _SECRET.search(str(k)) else redact(v) for k, v in value.items()}
    return [redact(v) for v in value] if isinstance(value, list | tuple) else value

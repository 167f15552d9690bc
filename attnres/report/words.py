"""The words and the number formats of the report: tables in, sentences out, in plain text.

Nothing here is markup: the HTML template escapes what it is given, and `markdown` does it for report.md.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from attnres.config import agreeing
from attnres.interventions.config import GridConfig
from attnres.report.tables import DISCOVERY, Tables
from attnres.tables import columns
from attnres.tables.names import ContrastVerdict, Measure, MotifVerdict, Verdict

SUBLAYER_NAMES = {"attn": "attention", "mlp": "MLP", "final": "final read", "": "single reads"}
MEASURE_NAMES = {
    Measure.MASS: "raw mass",
    Measure.NORM_SHARE: "norm-aware share",
    Measure.DISPLACEMENT: "displacement",
}
# Keys of a probe that say how many cells are corrected together, and which models stand beside the trained one.
_BESIDE = ("grid_cells", "schedules", "nulls")
_DECIDED: dict[str, str] = {
    ContrastVerdict.TRAINED_LARGER: "larger than in",
    ContrastVerdict.BASELINE_LARGER: "smaller than in",
    ContrastVerdict.EQUIVALENT: "equivalent to",
}


def sublayer_name(sublayer: str) -> str:
    """A sublayer in words; one that is unknown as it is."""
    return SUBLAYER_NAMES.get(sublayer, sublayer)


def cell_name(row: Mapping[str, Any]) -> str:
    """A cell in words: `embedding → early MLP`."""
    sublayer = sublayer_name(row["sublayer"]) if row["sublayer"] else ""
    return f"{row['family']} → {row['band']} {sublayer}".strip()


def visible(text: object) -> str:
    """Text with nothing in it that a reader cannot see: control characters and marks of direction become spaces."""
    return "".join(c if c.isprintable() or c in "\n\u00a0\u202f" else " " for c in str(text))


def disagreements(contrasts: pd.DataFrame) -> list[tuple[str, dict[str, str]]]:
    """Cells whose decided verdict differs between baselines: (cell in words, {baseline: decided verdict})."""
    clashes = []
    for _, rows in contrasts.groupby("cell", sort=False):
        decided = rows[rows["verdict"].isin(list(_DECIDED))]
        if decided["verdict"].nunique() > 1:
            verdicts = dict(zip(decided["baseline"], decided["verdict"], strict=True))
            clashes.append((cell_name(decided.iloc[0].to_dict()), verdicts))
    return clashes


def headline(tables: Tables) -> list[str]:
    """The verdict in plain sentences."""
    lines, trained = [], tables.trained
    grid = tables.primary[tables.primary["model"] == trained]
    eligible = grid[grid["eligible"]]
    count = eligible["verdict"].value_counts()
    outcome = ", ".join(f"{count.get(v, 0)} {v}" for v in (Verdict.CAUSAL, Verdict.NEGLIGIBLE, Verdict.INCONCLUSIVE))
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
            f"{count.get(ContrastVerdict.TRAINED_LARGER, 0)}, smaller in "
            f"{count.get(ContrastVerdict.BASELINE_LARGER, 0)}, equivalent in "
            f"{count.get(ContrastVerdict.EQUIVALENT, 0)}, undecided in {count.get(ContrastVerdict.INCONCLUSIVE, 0)}."
        )
    idle = eligible[eligible["appreciable"] & (eligible["verdict"] == Verdict.NEGLIGIBLE)]
    names = "; ".join(cell_name(r) for r in idle.to_dict("records"))
    lines.append(
        f"Appreciable mass without a detectable role (negligible): {names}."
        if names
        else "No cell of the trained model carries appreciable mass and is negligible."
    )
    for row in tables.summary.get("dissociation", []):
        if row.get("model", trained) != trained:
            continue
        shown = {k: row.get(k) or "–" for k in ("sublayer", "largest_mass", "largest_effect", "verdict")}
        lines.append(
            f"In {sublayer_name(shown['sublayer'])} the largest mass is "
            f"{shown['largest_mass']}, the largest effect {shown['largest_effect']}: {shown['verdict']}."
        )
    return lines


def motifs(tables: Tables) -> list[dict[str, Any]]:
    """Rows of the summary's motifs: all of the trained model, and what stands out in the others."""
    rows = [{name: row.get(name) for name in columns.MOTIFS.names} for row in tables.summary["motifs"]]
    stands_out = (MotifVerdict.MOTIF, MotifVerdict.UNCONTROLLED)
    return [row for row in rows if row["model"] == tables.trained or row["verdict"] in stands_out]


def compared(claim: Mapping[str, Any]) -> Mapping[str, Any]:
    """A claim's verdict by model, against one without trained routing or in one with; empty where it has none."""
    against, recurs = (claim.get(key) for key in ("against", "recurs"))
    return {**(against if isinstance(against, Mapping) else {}), **(recurs if isinstance(recurs, Mapping) else {})}


def _inside(value: Any, *keys: str) -> Any:
    """What lies under these keys of nested objects; None where one of them is no object or lacks the key."""
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def warnings(tables: Tables) -> list[str]:
    """What a reader must know before any number: baselines that disagree, a partial grid, earlier probes of the same
    cells, a failed check, an unverified checkpoint, a control of another base, models on different windows.
    """
    return [
        *_of_baselines(tables),
        *_of_the_grid(tables.summary.get("grid", {})),
        *_of_earlier_probes(tables.preregistration),
        *_of_checks(tables.summary),
        *_of_checkpoints(tables.summary),
        *_of_windows(tables),
    ]


def _of_baselines(tables: Tables) -> Iterator[str]:
    clashes = disagreements(tables.against_baselines)
    if clashes:
        shared = tables.against_baselines["cell"].nunique()
        name, verdicts = clashes[0]
        against = " and ".join(f"{_DECIDED[verdict]} {baseline}" for baseline, verdict in verdicts.items())
        yield (
            f"The baselines disagree on {len(clashes)} of {shared} cells: for example, the trained effect of "
            f"{name} is {against}. What training added can only be read from a baseline that shares the "
            f"trained model's source convention: {', '.join(tables.roles.shared) or 'none of these does'}."
        )


def _of_the_grid(grid: Mapping[str, Any]) -> Iterator[str]:
    if grid and not grid.get("complete", True):
        families = ", ".join(map(str, grid.get("families", []))) or "not stated"
        yield (
            f"This report holds part of the grid: {grid.get('run_cells', '?')} of "
            f"{grid.get('candidate_cells', '?')} candidate cells (families: {families}). Holm's correction "
            f"is over the full preregistered grid. {grid.get('note', '')}".strip()
        )


def _of_earlier_probes(registered: Mapping[str, Any]) -> Iterator[str]:
    earlier_probes = [row for row in _rows(registered.get("earlier_looks")) if _decisive(row.get("differs"))]
    if earlier_probes:
        named = "; ".join(
            f"{row.get('folder', '?')} ({', '.join(f'{k}={v}' for k, v in _decisive(row['differs']).items())})"
            for row in earlier_probes
        )
        yield (
            f"{len(earlier_probes)} earlier probe(s) of this checkpoint had results for some of these cells, under "
            f"other settings, when this one was registered: {named}."
        )


def _of_checks(summary: Mapping[str, Any]) -> Iterator[str]:
    failed = [check for check in summary.get("checks", []) if not check.get("passed")]
    if failed:
        names = "; ".join(f"{check.get('name', '?')} ({check.get('model', '?')})" for check in failed)
        yield f"{len(failed)} check(s) failed: {names}. The results below are not to be relied on."


def _of_checkpoints(summary: Mapping[str, Any]) -> Iterator[str]:
    for model in summary.get("models", []):
        if model.get("verified") is False:
            yield (
                f"The checkpoint of {model.get('name', '?')} ({model.get('path', '?')}) was loaded "
                "unverified: it has no manifest of hashes, so nothing shows that its files are those saved."
            )
    base = _inside(summary, "provenance", "hashes", "baseline")
    for model in summary.get("models", []):
        began = _inside(model, "training", "init", "digest")
        if None not in (began, base) and began != base:
            yield (
                f"{model.get('name', '?')} began from other weights than those of the vanilla baseline "
                f"({began} against {base}): it is no control of the same base."
            )


def _of_windows(tables: Tables) -> Iterator[str]:
    # A model goes up to the look that an open question needs: windows are compared look by look.
    drawn: dict[tuple[object, ...], set[frozenset[tuple[object, ...]]]] = {}
    for table in (tables.effects, tables.mass):
        keys = ["split", "look"] if "look" in table else []
        for key, rows in table.groupby(["model", *keys]):
            windows = frozenset(zip(rows["window"], rows["document"], rows["split"], strict=True))
            drawn.setdefault(key[1:], set()).add(windows)
    if any(len(sets) > 1 for sets in drawn.values()):
        yield "The models were not probed on the same windows: the contrasts below are not paired."


def _rows(value: Any) -> list[Mapping[str, Any]]:
    """The objects of a list; none where it is no list."""
    return [row for row in value if isinstance(row, Mapping)] if isinstance(value, list) else []


def _decisive(differs: Any) -> dict[str, Any]:
    """Of the keys in which two probes differ, those that can turn a verdict on one cell."""
    if not isinstance(differs, Mapping):
        return {}
    return {key: value for key, value in agreeing(GridConfig, differs).items() if key not in _BESIDE}


def number(value: float) -> str:
    """An effect for a reader: signed, three or four decimals, a true minus sign; an en dash for none."""
    if not np.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    size = abs(value)
    return _typeset(f"{value:{'+.1e' if size < 5e-5 else '+.4f' if size < 0.1 else '+.3f' if size < 10 else '+.1f'}}")


def plain(value: float, _position: object = None) -> str:
    """A number on an axis or in a table, without padding in its exponent: 0.1, −2, 1e−6."""
    return _typeset(f"{value:.3g}")


def _typeset(text: str) -> str:
    return re.sub(r"e([+−])0*(\d)", r"e\1\2", text.replace("-", "−"))


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
    if _is_number(row.get("p_holm")) or not _is_number(row.get(DISCOVERY)):
        return probability(row.get("p_holm"))
    return f"{probability(row[DISCOVERY])} (BH)"


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

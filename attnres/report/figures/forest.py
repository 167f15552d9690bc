"""Forest plots over the equivalence band: models, baselines, interventions or runs side by side in each cell."""

from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from attnres.depth.places import SUBLAYERS
from attnres.report import words
from attnres.report.figures import plotting
from attnres.tables.names import ContrastVerdict, Verdict

# Rows beyond this do not fit a page: the cells of the largest values are drawn.
MOST_ROWS = 48
_CELL = ("family", "sublayer", "band")
_EFFECT = {"dnll": "mid", "dnll_lo": "low", "dnll_hi": "high"}
_DIFFERENCE = {"diff": "mid", "diff_lo": "low", "diff_hi": "high"}


@plotting.styled
def effect_forest(cells: pd.DataFrame, models: Sequence[str], margin: float, by: str = "model") -> Figure:
    """Effect of every cell with its confidence interval, a mark per model (or per value of `by`).

    Args:
        cells: rows of cells.csv, one per cell and value of `by`.
        models: order of the models; others follow.
        by: the column whose values stand side by side: `model` or `intervention`.
    """
    plotting.need(cells, (by, *_CELL, "eligible", *_EFFECT, "verdict"), "forest plot")
    table = cells.rename(columns=_EFFECT | {by: "series"}).assign(filled=cells["verdict"] == Verdict.CAUSAL)
    return _forest(table, models, margin, "ΔNLL, nats/token (edited − clean)", "causal (filled)")


@plotting.styled
def contrast_forest(
    contrasts: pd.DataFrame, models: Sequence[str], margin: float, names: str = "trained − baseline"
) -> Figure:
    """Difference of effects per cell and baseline, over the equivalence band.

    Args:
        contrasts: rows of contrasts.csv of one intervention.
        models: order of all models, so that a baseline looks the same here as in `effect_forest`.
        names: what is subtracted from what.
    """
    plotting.need(contrasts, ("baseline", *_CELL, *_DIFFERENCE, "verdict"), "forest plot of contrasts")
    decided = contrasts["verdict"].isin((ContrastVerdict.TRAINED_LARGER, ContrastVerdict.BASELINE_LARGER))
    table = contrasts.rename(columns=_DIFFERENCE | {"baseline": "series"}).assign(filled=decided, eligible=True)
    return _forest(table, models, margin, f"difference of ΔNLL, nats/token ({names})", "larger or smaller (filled)")


def _forest(table: pd.DataFrame, order: Sequence[str], margin: float, axis_name: str, filled_name: str) -> Figure:
    """One row per (sublayer, place, family), one mark per series; ineligible ones are named as excluded."""
    series = plotting.ordered(table["series"], order)
    keys, count = _rows(table)
    height = 1.15 + (0.14 + 0.07 * len(series)) * max(len(keys), 2)
    figure = Figure(figsize=(7.6, height + 0.08 * len(series)), layout="constrained")
    axis = figure.subplots()
    used = table[table["eligible"].astype(bool)]
    plotting.effect_axis(axis, "x", [*used["low"], *used["high"], *used["mid"]], margin)
    groups = list(dict.fromkeys(k[:2] for k in keys))
    looks = {name: plotting.series_look(k) for k, name in enumerate(plotting.ordered([*order, *series], order))}
    records = {(r["series"], r["sublayer"], r["band"], r["family"]): r for r in table.to_dict("records")}
    for row, key in enumerate(keys):
        if groups.index(key[:2]) % 2:
            axis.axhspan(row - 0.5, row + 0.5, color="#f5f5f5", linewidth=0, zorder=-1)
        mine = {name: records[(name, *key)] for name in series if (name, *key) in records}
        _say_excluded(axis, row, [n for n, r in mine.items() if not r["eligible"]], len(series))
        for index, name in enumerate(series):
            if name in mine and mine[name]["eligible"]:
                y = row + (index - (len(series) - 1) / 2) * 0.7 / max(len(series), 1)
                _estimate(axis, y, mine[name], looks[name])
    axis.set_ylim(len(keys) - 0.5, -0.5)
    names = [plotting.label(f"{f} · {words.sublayer_name(s)} {b}") for s, b, f in keys]
    axis.set_yticks(range(len(keys)), names, fontsize=7)
    axis.tick_params(axis="y", length=0)
    axis.spines["left"].set_visible(False)
    axis.set_xlabel(axis_name)
    if count > len(keys):
        axis.set_title(f"the {len(keys)} cells of the largest values, of {count}", color=plotting.GREY, fontsize=7.5)
    handles = plotting.legend_marks([plotting.label(name, 44) for name in series], [looks[n] for n in series], 4.5)
    handles += plotting.legend_ends(filled_name, f"equivalence band ±{margin:g}", size=4.5)
    longest = max(len(plotting.label(name, 44)) for name in [*series, ""])
    columns = 5 if longest <= 14 else 3 if longest <= 26 else 2
    figure.legend(handles=handles, loc="outside upper center", ncols=min(columns, len(handles)))
    return figure


def _rows(table: pd.DataFrame) -> tuple[list[tuple[str, str, str]], int]:
    """The cells to draw as (sublayer, place, family), from the input to the output; and how many there are."""
    present = set(zip(table["sublayer"], table["band"], table["family"], strict=True))
    keys = [
        (s, b, f)
        for s in plotting.ordered(table["sublayer"], SUBLAYERS)
        for b in plotting.ordered_places(table["band"])
        for f in plotting.ordered(table["family"], plotting.DRAWN_FAMILIES)
        if (s, b, f) in present
    ]
    if len(keys) <= MOST_ROWS:
        return keys, len(keys)
    size = table[table["eligible"].astype(bool)].groupby(["sublayer", "band", "family"])["mid"]
    size = size.agg(lambda values: values.abs().max()).fillna(0.0)
    kept = set(size.sort_values(ascending=False, kind="stable").index[:MOST_ROWS])
    return [k for k in keys if k in kept], len(keys)


def _say_excluded(axis: Axes, row: float, names: list[str], count: int) -> None:
    if names:
        who = "all" if len(names) == count > 1 else ", ".join(plotting.label(name, 18) for name in names)
        axis.text(
            0.995,
            row,
            f"excluded: {who}",
            ha="right",
            va="center",
            fontsize=5.8,
            color=plotting.GREY,
            transform=axis.get_yaxis_transform(),
            in_layout=False,
        )


def _estimate(axis: Axes, y: float, record: dict[Any, Any], look: tuple[str, str]) -> None:
    colour, marker = look
    axis.plot([record["low"], record["high"]], [y, y], color=colour, linewidth=1.2)
    face = colour if record["filled"] else "white"
    axis.plot(
        record["mid"], y, marker, color=colour, markersize=4.3, markeredgewidth=0.9, markerfacecolor=face
    )  # fmt: skip

"""Figures over several interventions or steps: dose-response curves, whole-read ladders, effects along training."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from attnres.depth.places import SUBLAYERS, WHOLE_READ
from attnres.report import words
from attnres.report.figures import plotting

# Whole-read interventions, from the gentlest: weights without content, of another text, all equal, a baseline's.
RUNGS = ("mean", "resample", "uniform", "schedule")
MOST_PANELS, MOST_LINES = 6, 6
_EFFECT = ("family", "sublayer", "band", "eligible", "dnll", "dnll_lo", "dnll_hi", "verdict")


@plotting.styled
def dose_response(cells: pd.DataFrame, title: str, margin: float) -> Figure:
    """Effect against the factor x on a family's odds, a panel per sublayer and place, a line per family.

    Args:
        cells: rows of one model, as in cells.csv: those of `scale:x`, and of `mask` as x = 0. The clean run, x = 1,
            is zero by definition and is drawn as a cross.
    """
    plotting.need(cells, ("intervention", *_EFFECT), "dose-response curves")
    table = cells.assign(dose=[plotting.dose(v) for v in cells["intervention"]]).dropna(subset=["dose", "dnll"])
    table = table[table["eligible"].astype(bool)].drop_duplicates(["family", "sublayer", "band", "dose"])
    positive = sorted({float(x) for x in table["dose"] if x > 0} | {1.0})
    step = 1.0 if len(positive) < 2 else float(np.diff(np.log2(positive)).min())
    place = {x: float(np.log2(x)) for x in positive} | {0.0: float(np.log2(positive[0])) - max(step, 0.5)}
    doses = [x for x in place if x == 1 or (table["dose"] == x).any()]
    figure, handles = _panels(
        table.assign(x=table["dose"].map(place)),
        margin,
        lambda axis: axis.plot(0, 0, "x", color=plotting.INK, markersize=5, zorder=3),
        "factor on the family's odds (0 removes it, 1 is the clean run)",
    )
    for axis in figure.axes:
        axis.set_xticks([place[x] for x in doses], [words.plain(x) for x in doses])
    handles.append(Line2D([], [], color=plotting.INK, marker="x", linestyle="", markersize=5, label="clean run"))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(7, len(handles)))
    plotting.heading(figure, plotting.label(title))
    return figure


@plotting.styled
def trajectory(cells: pd.DataFrame, title: str, margin: float) -> Figure:
    """Effect of each cell along training, a panel per sublayer and place, a line per family.

    Args:
        cells: rows of cells.csv of the trained model at several steps of one training, with their `step`.
    """
    plotting.need(cells, ("step", *_EFFECT), "trajectory")
    table = cells[cells["eligible"].astype(bool)].dropna(subset=["step", "dnll"])
    steps = sorted(set(table["step"].astype(float)))
    figure, handles = _panels(table.assign(x=table["step"].astype(float)), margin, None, "training step")
    in_log = bool(steps) and steps[0] > 0 and steps[-1] / steps[0] > 8
    for axis in figure.axes:
        if in_log:
            axis.set_xscale("log")
        if len(steps) <= 8:
            axis.set_xticks(steps, _step_labels(np.log(steps) if in_log else np.asarray(steps), steps),
                            rotation=40, ha="right")  # fmt: skip
            axis.set_xticks([], minor=True)
    figure.legend(handles=handles, loc="outside lower center", ncols=min(7, len(handles)))
    plotting.heading(figure, plotting.label(title))
    return figure


def _step_labels(places: np.ndarray, steps: Sequence[float]) -> list[str]:
    """A label for each step but those so near to the next one that the two would touch."""
    near = np.diff(places) < 0.12 * (places[-1] - places[0]) if len(places) > 1 else np.zeros(0, dtype=bool)
    return ["" if too_near else f"{step:g}" for step, too_near in zip(steps, [*near, False], strict=True)]


def _panels(
    table: pd.DataFrame, margin: float, anchor: Callable[[Axes], object] | None, x_name: str
) -> tuple[Figure, list[Any]]:
    """Small multiples of effect against `x`, those of the largest effects where there are many."""
    size = table.groupby(["sublayer", "band"])["dnll"].agg(lambda v: v.abs().max())
    kept = set(size.sort_values(ascending=False, kind="stable").index[:MOST_PANELS])
    keys = [
        (s, b)
        for s in plotting.ordered(table["sublayer"], SUBLAYERS)
        for b in plotting.ordered_places(table["band"])
        if (s, b) in kept
    ] or [("", "")]  # fmt: skip
    columns = min(3, len(keys))
    rows = -(-len(keys) // columns)
    figure = Figure(figsize=(1.2 + 2.15 * columns, 1.0 + 1.75 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    families = plotting.ordered(table["family"], plotting.DRAWN_FAMILIES)
    for axis, (sublayer, band) in zip(axes.flat, keys, strict=False):
        plotting.effect_axis(axis, "y", [*table["dnll_lo"], *table["dnll_hi"], *table["dnll"]], margin)
        axis.set_title(plotting.label(f"{words.sublayer_name(sublayer)} {band}", 24), fontsize=8)
        for family in families:
            rows_ = table[(table["sublayer"] == sublayer) & (table["band"] == band) & (table["family"] == family)]
            if len(rows_):
                _line(axis, rows_.sort_values("x"), plotting.family_look(family))
        if anchor is not None:
            anchor(axis)
        axis.margins(x=0.08)
    for axis in axes.flat[len(keys) :]:
        axis.set_visible(False)
    axes[-1, columns // 2].set_xlabel(x_name)
    figure.supylabel("ΔNLL, nats/token", fontsize=8)
    handles = plotting.legend_families(families, 4)
    handles += plotting.legend_ends("causal (filled)", f"±{margin:g} nat")
    return figure, handles


def _line(axis: Axes, rows: pd.DataFrame, look: tuple[str, str]) -> None:
    x = rows["x"].to_numpy(float)
    axis.plot(x, rows["dnll"], color=look[0], linewidth=1)
    for place, record in zip(x, rows.to_dict("records"), strict=True):
        plotting.effect_mark(axis, place, record, look, 4)


def rungs(cells: pd.DataFrame) -> pd.DataFrame:
    """The rows of whole-read interventions, each of which is a rung."""
    kinds = cells["intervention"].str.split(":").str[0]
    return cells[(cells["family"] == WHOLE_READ) | kinds.isin(("mean", "resample"))]


@plotting.styled
def read_ladder(cells: pd.DataFrame, title: str, margin: float) -> Figure:
    """Loss of whole-read interventions over the clean run: a rung each, a line per place, a panel per sublayer.

    Args:
        cells: rows of one model, as in cells.csv, of whole-read interventions; others are left out.
    """
    plotting.need(cells, ("intervention", *_EFFECT), "ladder")
    table = rungs(cells)
    table = table[table["eligible"].astype(bool)].dropna(subset=["dnll"])
    order = sorted(dict.fromkeys(table["intervention"]), key=_rung)
    sublayers = plotting.ordered(table["sublayer"], SUBLAYERS) or ["attn"]
    figure = Figure(figsize=(1.0 + 3.3 * len(sublayers), 3.4), layout="constrained")
    axes = figure.subplots(1, len(sublayers), sharey=True, squeeze=False)[0]
    size = table.groupby("band")["dnll"].agg(lambda v: v.abs().max()).sort_values(ascending=False, kind="stable")
    places = [p for p in plotting.ordered_places(table["band"]) if p in set(size.index[:MOST_LINES])]
    for axis, sublayer in zip(axes, sublayers, strict=True):
        plotting.effect_axis(axis, "y", [*table["dnll_lo"], *table["dnll_hi"], *table["dnll"]], margin)
        axis.set_title(plotting.label(words.sublayer_name(sublayer), 16), fontsize=8.5, fontweight="bold")
        for k, place in enumerate(places):
            rows = table[(table["sublayer"] == sublayer) & (table["band"] == place)].drop_duplicates("intervention")
            shift = 0.06 * (k - (len(places) - 1) / 2)
            rows = rows.assign(x=[1 + order.index(r) + shift for r in rows["intervention"]]).sort_values("x")
            if len(rows):
                look = plotting.series_look(k)
                axis.plot([0, rows["x"].iloc[0]], [0, rows["dnll"].iloc[0]], color=look[0], linewidth=1)
                _line(axis, rows, look)
        axis.plot(0, 0, "x", color=plotting.INK, markersize=5, zorder=3)
        axis.set_xticks(range(len(order) + 1), ["clean", *(plotting.label(r, 18) for r in order)])
        axis.set_xlim(-0.4, len(order) + 0.4)
    axes[0].set_ylabel("loss over the clean run, nats/token")
    looks = map(plotting.series_look, range(len(places)))
    handles = plotting.legend_marks([plotting.label(p, 12) for p in places], looks, 4)
    handles += plotting.legend_ends("causal (filled)", f"±{margin:g} nat")
    figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(handles)))
    plotting.heading(figure, plotting.label(title))
    return figure


def _rung(name: str) -> tuple[int, str]:
    kind = name.split(":")[0]
    return RUNGS.index(kind) if kind in RUNGS else len(RUNGS), name

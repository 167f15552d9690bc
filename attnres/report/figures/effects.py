"""Maps of effects: family x band x sublayer of one model, and the same layer by layer.

Pure functions from a table to a `Figure`, as in `figures`. Effects are in nats/token.
"""

import textwrap
from collections.abc import Mapping
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from attnres.depth.places import SUBLAYERS, place_kind
from attnres.report.figures.plotting import (
    BAND_COLOUR,
    DRAWN_FAMILIES,
    FAMILY_COLOURS,
    FAMILY_MARKERS,
    GREY,
    INK,
    PALE,
    SUBLAYER_NAMES,
    VERDICT_SIGNS,
    effect_axis,
    effect_bar,
    effect_norm,
    ink_on,
    label,
    need,
    number,
    ordered,
    ordered_places,
    place_tick,
    styled,
)

_COLUMNS = ("family", "sublayer", "band", "eligible", "reason", "dnll", "dnll_lo", "dnll_hi", "verdict")
_COLOURS = "RdBu_r"


@styled
def effect_map(cells: pd.DataFrame, title: str, limit: float, margin: float) -> Figure:
    """Family x band x sublayer map of dNLL: estimate, confidence interval and verdict in each cell.

    Excluded cells are grey, hatched, and carry their reason.

    Args:
        cells: rows of one model and one intervention, as in cells.csv; a handful of places, see `place_map`.
        title: name of the model.
        limit: end of the colour scale in nats/token; give every model the same.
        margin: equivalence margin in nats/token; the colour scale is linear inside it.
    """
    need(cells, _COLUMNS, "effect map")
    families = ordered(cells["family"], DRAWN_FAMILIES)
    sublayers, bands = ordered(cells["sublayer"], SUBLAYERS), ordered_places(cells["band"])
    columns = [(s, b) for s in sublayers for b in bands]
    figure = Figure(figsize=(1.75 + 1.06 * len(columns), 0.95 + 0.52 * len(families)), layout="constrained")
    axis = figure.subplots()
    norm = effect_norm(limit, margin)
    place = {c: k + 0.15 * sublayers.index(c[0]) for k, c in enumerate(columns)}
    for record in cells.to_dict("records"):
        x, row = place[record["sublayer"], record["band"]], families.index(record["family"])
        face = _box(axis, x, row, record, norm)
        if face is not None:
            _estimate(axis, x, row, record, ink_on(face))
        else:
            why = textwrap.wrap(textwrap.shorten(label(record["reason"], 90), 60, placeholder=" …"), 19)
            _say(axis, x, row + 0.5, "\n".join(["excluded:", *why[:3]]), color="#444444", fontsize=5.8)
    end = place[columns[-1]] + 1 if columns else 1
    axis.set_xlim(0, end)
    axis.set_ylim(len(families), 0)
    axis.set_yticks([k + 0.5 for k in range(len(families))], [label(f, 14) for f in families])
    axis.set_xticks([place[c] + 0.5 for c in columns], [label(c[1], 10) for c in columns])
    axis.xaxis.tick_top()
    axis.tick_params(length=0)
    axis.spines[["left", "bottom"]].set_visible(False)
    for sublayer in sublayers:
        middle = np.mean([place[c] + 0.5 for c in columns if c[0] == sublayer])
        axis.annotate(
            label(SUBLAYER_NAMES.get(sublayer, sublayer), 16),
            (float(middle), 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 19),
            fontsize=8.5,
            textcoords="offset points",
            ha="center",
            fontweight="bold",
        )
    figure.suptitle(label(title), x=0.01, ha="left", fontsize=9.5, fontweight="bold")
    effect_bar(figure, axis, norm, margin)
    return figure


def _box(axis: Axes, x: float, row: float, record: Mapping[Any, Any], norm: Normalize) -> Any:
    """Fills a cell with its effect; an excluded one is hatched. Returns the colour, None if excluded."""
    box: dict[str, Any] = {"edgecolor": "white", "linewidth": 1.2}
    value = float(record["dnll"])
    face = matplotlib.colormaps[_COLOURS](norm(value)) if record["eligible"] and np.isfinite(value) else PALE
    axis.add_patch(Rectangle((x, row), 1, 1, facecolor=face, **box))
    if record["eligible"]:
        return face
    hatched = Rectangle((x + 0.02, row + 0.03), 0.96, 0.94, fill=False, hatch="////", edgecolor="#d2d2d2", linewidth=0)
    axis.add_patch(hatched)
    return None


def _say(axis: Axes, x: float, y: float, text: str, **style: Any) -> None:
    axis.text(x + 0.5, y, text, ha="center", va="center", linespacing=1.15, in_layout=False, **style)


def _estimate(axis: Axes, x: float, row: float, record: Mapping[Any, Any], ink: str) -> None:
    span = f"[{number(float(record['dnll_lo']))}, {number(float(record['dnll_hi']))}]"
    _say(axis, x, row + 0.27, number(float(record["dnll"])), color=ink, fontsize=8.5, fontweight="bold")
    _say(axis, x, row + 0.54, span, color=ink, fontsize=6.2)
    _say(axis, x, row + 0.79, label(record["verdict"], 14), color=ink, fontsize=6.6, fontstyle="italic")


@styled
def place_map(cells: pd.DataFrame, title: str, limit: float, margin: float) -> Figure:
    """dNLL along the depth: per sublayer a strip of families x places and, below it, the effects with their CIs.

    In the strip a sign repeats the verdict (● causal, ≡ null, ○ inconclusive); excluded cells are grey and hatched.

    Args:
        cells: rows of one model and one intervention, as in cells.csv, whose `band` names layers, blocks or reads.
        title: name of the model.
        limit: end of the colour scale in nats/token; give every model the same.
        margin: equivalence margin in nats/token.
    """
    need(cells, _COLUMNS, "map along the depth")
    families, places = ordered(cells["family"], DRAWN_FAMILIES), ordered_places(cells["band"])
    sublayers = ordered(cells["sublayer"], SUBLAYERS)
    heights = [part for _ in sublayers for part in (0.24 * len(families) + 0.1, 1.45)]
    figure = Figure(figsize=(7.6, 0.9 + 0.35 * len(sublayers) + sum(heights)), layout="constrained")
    axes = figure.subplots(2 * len(sublayers), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    norm = effect_norm(limit, margin)
    used = cells[cells["eligible"].astype(bool)]
    for index, sublayer in enumerate(sublayers):
        strip, curve = axes[2 * index], axes[2 * index + 1]
        part = cells[cells["sublayer"] == sublayer]
        for record in part.to_dict("records"):
            x, row = places.index(record["band"]), families.index(record["family"])
            face = _box(strip, x, row, record, norm)
            if face is not None and len(places) <= 40:
                sign = VERDICT_SIGNS.get(record["verdict"], "")
                _say(strip, x, row + 0.5, sign, color=ink_on(face), fontsize=6)
        strip.set_ylim(len(families), 0)
        strip.set_yticks([k + 0.5 for k in range(len(families))], [label(f, 14) for f in families], fontsize=7)
        strip.tick_params(length=0)
        strip.spines[["left", "bottom"]].set_visible(False)
        strip.set_title(label(SUBLAYER_NAMES.get(sublayer, sublayer), 16), fontsize=8.5, fontweight="bold")
        effect_axis(curve, "y", [*used["dnll_lo"], *used["dnll_hi"], *used["dnll"]], margin)
        curve.set_ylabel("ΔNLL, nats/token", fontsize=7)
        for k, family in enumerate(families):
            rows = part[(part["family"] == family) & part["eligible"].astype(bool)]
            at = np.array([places.index(b) for b in rows["band"]], float) + 0.5 + 0.16 * (k - (len(families) - 1) / 2)
            _curve(curve, at, rows.to_dict("records"), family)
    step = -(-len(places) // 30)
    ticks = range(0, len(places), step)
    axes[-1].set_xticks([k + 0.5 for k in ticks], [place_tick(places[k]) for k in ticks])
    axes[-1].set_xlim(0, len(places))
    axes[-1].set_xlabel(
        " and ".join(dict.fromkeys(place_kind(p) for p in places))
        .replace("composition", "place")
        .replace("other", "place")
    )
    effect_bar(figure, axes[::2].tolist(), norm, margin)
    handles: list[Any] = [
        Line2D([], [], color=FAMILY_COLOURS.get(f, GREY), marker=FAMILY_MARKERS.get(f, "X"), markersize=4,
               markerfacecolor="white", label=label(f, 14))
        for f in families
    ]  # fmt: skip
    handles.append(Line2D([], [], color=INK, marker="o", linestyle="", markersize=4, label="causal (filled, ●)"))
    handles.append(Patch(color=BAND_COLOUR, alpha=0.3, label=f"equivalence band ±{margin:g} (≡ null)"))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(handles)))
    figure.suptitle(label(title), x=0.01, ha="left", fontsize=9.5, fontweight="bold")
    return figure


def _curve(axis: Axes, x: np.ndarray, records: list[dict[Any, Any]], family: str) -> None:
    colour, marker = FAMILY_COLOURS.get(family, GREY), FAMILY_MARKERS.get(family, "X")
    order = np.argsort(x)
    axis.plot(x[order], [records[k]["dnll"] for k in order], color=colour, linewidth=0.7, alpha=0.7)
    for place, record in zip(x, records, strict=True):
        axis.plot([place, place], [record["dnll_lo"], record["dnll_hi"]], color=colour, linewidth=1)
        face = colour if record["verdict"] == "causal" else "white"
        axis.plot(place, record["dnll"], marker, color=colour, markersize=3.4, markerfacecolor=face)

"""Maps of effects: family x band x sublayer of one model, and the same layer by layer."""

import textwrap
from collections.abc import Mapping
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from attnres.depth.places import SUBLAYERS, place_kind
from attnres.report import words
from attnres.report.figures import plotting

_COLUMNS = ("family", "sublayer", "band", "eligible", "reason", "dnll", "dnll_lo", "dnll_hi", "verdict")
_COLOURS = "RdBu_r"


@plotting.styled
def effect_map(cells: pd.DataFrame, title: str, limit: float, margin: float) -> Figure:
    """Family x band x sublayer map of dNLL: estimate, confidence interval and verdict in each cell.

    Excluded cells are grey, hatched, and carry their reason.

    Args:
        cells: rows of one model and one intervention, as in cells.csv; a handful of places, see `place_map`.
        limit: end of the colour scale in nats/token; give every model the same.
        margin: the colour scale is linear inside it.
    """
    plotting.need(cells, _COLUMNS, "effect map")
    families = plotting.ordered(cells["family"], plotting.DRAWN_FAMILIES)
    sublayers, bands = plotting.ordered(cells["sublayer"], SUBLAYERS), plotting.ordered_places(cells["band"])
    columns = [(s, b) for s in sublayers for b in bands]
    figure = Figure(figsize=(1.75 + 1.06 * len(columns), 0.95 + 0.52 * len(families)), layout="constrained")
    axis = figure.subplots()
    norm = plotting.effect_norm(limit, margin)
    place = {c: k + 0.15 * sublayers.index(c[0]) for k, c in enumerate(columns)}
    for record in cells.to_dict("records"):
        x, row = place[record["sublayer"], record["band"]], families.index(record["family"])
        face = _box(axis, x, row, record, norm)
        if face is not None:
            _estimate(axis, x, row, record, plotting.ink_on(face))
        else:
            why = textwrap.wrap(textwrap.shorten(plotting.label(record["reason"], 90), 60, placeholder=" …"), 19)
            _say(axis, x, row + 0.5, "\n".join(["excluded:", *why[:3]]), color="#444444", fontsize=5.8)
    end = place[columns[-1]] + 1 if columns else 1
    axis.set_xlim(0, end)
    axis.set_ylim(len(families), 0)
    axis.set_yticks([k + 0.5 for k in range(len(families))], [plotting.label(f, 14) for f in families])
    axis.set_xticks([place[c] + 0.5 for c in columns], [plotting.label(c[1], 10) for c in columns])
    axis.xaxis.tick_top()
    axis.tick_params(length=0)
    axis.spines[["left", "bottom"]].set_visible(False)
    for sublayer in sublayers:
        middle = np.mean([place[c] + 0.5 for c in columns if c[0] == sublayer])
        axis.annotate(
            plotting.label(words.sublayer_name(sublayer), 16),
            (float(middle), 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 19),
            fontsize=8.5,
            textcoords="offset points",
            ha="center",
            fontweight="bold",
        )
    plotting.heading(figure, plotting.label(title))
    plotting.effect_bar(figure, axis, norm, margin)
    return figure


def _box(axis: Axes, x: float, row: float, record: Mapping[Any, Any], norm: Normalize) -> Any:
    """Fills a cell with its effect; an excluded one is hatched. Returns the colour, None if excluded."""
    box: dict[str, Any] = {"edgecolor": "white", "linewidth": 1.2}
    value = float(record["dnll"])
    face = matplotlib.colormaps[_COLOURS](norm(value)) if record["eligible"] and np.isfinite(value) else plotting.PALE
    axis.add_patch(Rectangle((x, row), 1, 1, facecolor=face, **box))
    if record["eligible"]:
        return face
    hatched = Rectangle((x + 0.02, row + 0.03), 0.96, 0.94, fill=False, hatch="////", edgecolor="#d2d2d2", linewidth=0)
    axis.add_patch(hatched)
    return None


def _say(axis: Axes, x: float, y: float, text: str, **style: Any) -> None:
    axis.text(x + 0.5, y, text, ha="center", va="center", linespacing=1.15, in_layout=False, **style)


def _estimate(axis: Axes, x: float, row: float, record: Mapping[Any, Any], ink: str) -> None:
    span = f"[{words.number(float(record['dnll_lo']))}, {words.number(float(record['dnll_hi']))}]"
    _say(axis, x, row + 0.27, words.number(float(record["dnll"])), color=ink, fontsize=8.5, fontweight="bold")
    _say(axis, x, row + 0.54, span, color=ink, fontsize=6.2)
    _say(axis, x, row + 0.79, plotting.label(record["verdict"], 14), color=ink, fontsize=6.6, fontstyle="italic")


@plotting.styled
def place_map(cells: pd.DataFrame, title: str, limit: float, margin: float) -> Figure:
    """dNLL along the depth: per sublayer a strip of families x places and, below it, the effects with their CIs.

    In the strip a sign repeats the verdict (● causal, ≡ negligible, ○ inconclusive); excluded cells are grey,
    hatched.

    Args:
        cells: rows of one model and one intervention, as in cells.csv, whose `band` names layers, blocks or reads.
        limit: end of the colour scale in nats/token; give every model the same.
    """
    plotting.need(cells, _COLUMNS, "map along the depth")
    families = plotting.ordered(cells["family"], plotting.DRAWN_FAMILIES)
    places = plotting.ordered_places(cells["band"])
    sublayers = plotting.ordered(cells["sublayer"], SUBLAYERS)
    heights = [height for _ in sublayers for height in (0.24 * len(families) + 0.1, 1.45)]
    figure = Figure(figsize=(7.6, 0.9 + 0.35 * len(sublayers) + sum(heights)), layout="constrained")
    axes = figure.subplots(2 * len(sublayers), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    norm = plotting.effect_norm(limit, margin)
    used = cells[cells["eligible"].astype(bool)]
    for index, sublayer in enumerate(sublayers):
        strip, curve = axes[2 * index], axes[2 * index + 1]
        drawn = cells[cells["sublayer"] == sublayer]
        for record in drawn.to_dict("records"):
            x, row = places.index(record["band"]), families.index(record["family"])
            face = _box(strip, x, row, record, norm)
            if face is not None and len(places) <= 40:
                sign = plotting.VERDICT_SIGNS.get(record["verdict"], "")
                _say(strip, x, row + 0.5, sign, color=plotting.ink_on(face), fontsize=6)
        strip.set_ylim(len(families), 0)
        strip.set_yticks([k + 0.5 for k in range(len(families))], [plotting.label(f, 14) for f in families], fontsize=7)
        strip.tick_params(length=0)
        strip.spines[["left", "bottom"]].set_visible(False)
        strip.set_title(plotting.label(words.sublayer_name(sublayer), 16), fontsize=8.5, fontweight="bold")
        plotting.effect_axis(curve, "y", [*used["dnll_lo"], *used["dnll_hi"], *used["dnll"]], margin)
        curve.set_ylabel("ΔNLL, nats/token", fontsize=7)
        for k, family in enumerate(families):
            rows = drawn[(drawn["family"] == family) & drawn["eligible"].astype(bool)]
            at = np.array([places.index(b) for b in rows["band"]], float) + 0.5 + 0.16 * (k - (len(families) - 1) / 2)
            _curve(curve, at, rows.to_dict("records"), family)
    step = -(-len(places) // 30)
    ticks = range(0, len(places), step)
    axes[-1].set_xticks([k + 0.5 for k in ticks], [plotting.place_tick(places[k]) for k in ticks])
    axes[-1].set_xlim(0, len(places))
    axes[-1].set_xlabel(
        " and ".join(dict.fromkeys(place_kind(p) for p in places))
        .replace("composition", "place")
        .replace("other", "place")
    )
    plotting.effect_bar(figure, axes[::2].tolist(), norm, margin)
    handles = plotting.legend_families(families, 4)
    handles += plotting.legend_ends("causal (filled, ●)", f"equivalence band ±{margin:g} (≡ negligible)")
    figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(handles)))
    plotting.heading(figure, plotting.label(title))
    return figure


def along_depth(place: str) -> bool:
    """Whether a place is one of many along the depth, which `place_map` shows."""
    return place_kind(place) in ("layer", "block", "read")


def any_map(cells: pd.DataFrame, title: str, limit: float, margin: float) -> Figure:
    """`place_map` where the cells are along the depth, else `effect_map`."""
    form = place_map if along_depth(str(cells["band"].iloc[0])) else effect_map
    return form(cells, title, limit, margin)


def _curve(axis: Axes, x: np.ndarray, records: list[dict[Any, Any]], family: str) -> None:
    look, order = plotting.family_look(family), np.argsort(x)
    axis.plot(x[order], [records[k]["dnll"] for k in order], color=look[0], linewidth=0.7, alpha=0.7)
    for place, record in zip(x, records, strict=True):
        plotting.effect_mark(axis, place, record, look, 3.4)

"""Figures that set the cells of one model against each other: mass against effect, and ranks."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from attnres.depth.places import SUBLAYERS
from attnres.report import words
from attnres.report.figures import plotting
from attnres.tables.names import Measure, Verdict

MEASURES = {
    Measure.MASS: "raw mass (routing weight)",
    Measure.NORM_SHARE: "norm-aware share of the mix",
    Measure.DISPLACEMENT: "displacement of the input",
}
# More cells than this are too many for names in a figure: those of the largest effects are drawn.
MOST_RANKED = 36


@plotting.styled
def mass_effect_scatter(cells: pd.DataFrame, title: str, margin: float) -> Figure:
    """Effect of each cell against its raw mass, its norm-aware share and its displacement, a row per sublayer.

    Colour and shape are the family, the letter or number the place; a filled mark is a `causal` verdict. The rank
    correlation in each heading describes the points drawn and is not a test.

    Args:
        cells: rows of one model and one intervention, as in cells.csv; ineligible ones are left out.
    """
    intervals = ("mass_lo", "mass_hi", "dnll_lo", "dnll_hi")
    plotting.need(
        cells,
        ("family", "sublayer", "band", "eligible", "dnll", "verdict", *MEASURES, *intervals),
        "scatter of mass and effect",
    )
    table = cells[cells["eligible"].astype(bool)]
    sublayers = plotting.ordered(table["sublayer"], SUBLAYERS) or ["attn"]
    figure = Figure(figsize=(7.6, 0.75 + 2.45 * len(sublayers)), layout="constrained")
    axes = figure.subplots(len(sublayers), 3, sharey=True, sharex="col", squeeze=False)
    for row, sublayer in enumerate(sublayers):
        drawn = table[table["sublayer"] == sublayer]
        for axis, measure in zip(axes[row], MEASURES, strict=True):
            plotting.effect_axis(axis, "y", [*table["dnll_lo"], *table["dnll_hi"], *table["dnll"]], margin)
            for record in drawn.to_dict("records"):
                _mark(axis, record, measure, wordy=len(drawn) <= 30)
            pairs = drawn[[measure, "dnll"]].dropna()
            varied = len(pairs) > 2 and pairs[measure].nunique() > 1 and pairs["dnll"].nunique() > 1
            rho = pairs[measure].rank().corr(pairs["dnll"].rank()) if varied else np.nan
            heading = f"Spearman ρ = {rho:.2f}".replace("-", "−") if np.isfinite(rho) else "Spearman ρ undefined"
            axis.set_title(f"{heading} ({len(pairs)} cells)", color=plotting.GREY, fontsize=7.5)
            if row == len(sublayers) - 1:
                axis.set_xlabel(MEASURES[measure])
            axis.margins(x=0.1)
        axes[row, 0].set_ylabel(f"{plotting.label(words.sublayer_name(sublayer), 12)}: ΔNLL, nats/token")
    families = plotting.ordered(table["family"], plotting.DRAWN_FAMILIES)
    handles = plotting.legend_families(families, 6.5, linestyle="")
    handles += plotting.legend_ends("causal (filled)", f"±{margin:g} nat margin", size=None)
    figure.legend(handles=handles, loc="outside lower center", ncols=6, columnspacing=1.4, handletextpad=0.4)
    plotting.heading(figure, plotting.label(title))
    return figure


def _mark(axis: Axes, record: Mapping[Any, Any], measure: str, wordy: bool) -> None:
    x, y, (colour, marker) = record[measure], record["dnll"], plotting.family_look(record["family"])
    if measure == Measure.MASS:
        axis.plot([record["mass_lo"], record["mass_hi"]], [y, y], color=plotting.GREY, linewidth=0.7, zorder=1)
    axis.plot([x, x], [record["dnll_lo"], record["dnll_hi"]], color=plotting.GREY, linewidth=0.7, zorder=1)
    face = colour if record["verdict"] == Verdict.CAUSAL else "white"
    axis.plot(x, y, marker, markersize=8.5 if wordy else 5, zorder=2, color=colour, markerfacecolor=face)
    if wordy and np.isfinite(x) and np.isfinite(y):
        axis.annotate(
            plotting.place_tick(str(record["band"])),
            (x, y),
            ha="center",
            va="center_baseline",
            fontsize=5.5,
            color=plotting.ink_on(face),
            zorder=3,
            annotation_clip=False,
            in_layout=False,
        )


@plotting.styled
def rank_slopegraph(cells: pd.DataFrame, title: str) -> Figure:
    """The eligible cells ranked by mass, norm-aware share, displacement and effect, a line each.

    Of many cells, those of the `MOST_RANKED` largest effects are ranked.

    Args:
        cells: rows of one model and one intervention, as in cells.csv.
    """
    plotting.need(cells, ("family", "sublayer", "band", "eligible", "dnll", "verdict", *MEASURES), "slopegraph")
    measures = [*MEASURES, "dnll"]
    table = cells[cells["eligible"].astype(bool)].dropna(subset=measures)
    count = len(table)
    largest = table["dnll"].abs().to_numpy().argsort(kind="stable")[::-1][:MOST_RANKED]
    table = table.iloc[sorted(largest)]
    ranks = table[measures].rank(ascending=False, method="first")
    figure = Figure(figsize=(7.6, 0.9 + 0.2 * max(len(table), 4)), layout="constrained")
    axis = figure.subplots()
    last = len(measures) - 1
    for record, ranked in zip(table.to_dict("records"), ranks.to_numpy(), strict=True):
        colour, marker = plotting.family_look(record["family"])
        filled = record["verdict"] == Verdict.CAUSAL
        axis.plot(
            range(len(measures)),
            ranked,
            color=colour,
            linewidth=1.6 if filled else 0.9,
            alpha=0.9,
            markersize=5,
            linestyle="-" if filled else (0, (3, 2)),
            marker=marker,
            markerfacecolor=colour if filled else "white",
        )
        sublayer = words.sublayer_name(record["sublayer"])
        name = plotting.label(f"{record['family']} · {sublayer} {record['band']}")
        axis.text(-0.08, ranked[0], name, ha="right", va="center", fontsize=7, in_layout=False)
        effect = f"{name}  {words.number(record['dnll'])}"
        axis.text(last + 0.08, ranked[-1], effect, ha="left", va="center", fontsize=7, in_layout=False)
    axis.set_xlim(-1.25, last + 1.6)
    axis.set_ylim(len(table) + 0.7, 0.3)
    axis.set_xticks(range(len(measures)), ["by raw mass", "by norm-aware\nshare", "by displacement", "by effect"])
    axis.xaxis.tick_top()
    axis.tick_params(length=0)
    axis.set_yticks([])
    axis.spines[["left", "bottom"]].set_visible(False)
    most = "" if count == len(table) else f" ({len(table)} largest effects of {count} cells)"
    plotting.heading(figure, plotting.label(title) + most)
    return figure

"""Figures of routing: where each read looks, and a baseline's weights on their analytic line."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from attnres.depth.places import SUBLAYERS
from attnres.report import words
from attnres.report.figures import plotting


@plotting.styled
def routing_heatmap(routing: pd.DataFrame, title: str) -> Figure:
    """Mean routing weight of every read, as two triangles: attention reads and MLP reads by layer.

    Columns are the sources, oldest first; the family "current" stands in a column of its own at the right. A
    read with a single source has nothing to choose and is hatched. The final read, if any, is the last row of
    the right-hand triangle.

    Args:
        routing: rows of one model: read, layer, sublayer, source, num_sources, weight, role.
    """
    plotting.need(routing, ("layer", "sublayer", "source", "num_sources", "weight", "role"), "routing heatmap")
    past = routing[routing["role"] != "current"]
    columns = int(past["source"].max()) + 1 if len(past) else 1
    body = routing[routing["sublayer"] != "final"]
    layers = int(body["layer"].max()) + 1 if len(body) else 1
    has_final = bool((routing["sublayer"] == "final").any())
    rows = layers + (1.4 if has_final else 0)
    height = min(0.25, max(0.115, 5.0 / rows))
    width = min(0.21, max(0.12, 2.0 / columns))
    figure = Figure(figsize=(1.15 + 2 * (columns + 1.4) * width, 1.05 + rows * height), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    mesh = None
    for axis, sublayer in zip(axes, SUBLAYERS, strict=True):
        drawn = routing[routing["sublayer"].isin((sublayer, "final") if sublayer == "mlp" else (sublayer,))]
        body_rows = np.arange(layers + 1.0)
        for final in (False, True):
            chosen = drawn[(drawn["sublayer"] == "final") == final]
            if chosen.empty:
                continue
            edges = np.array([layers + 0.4, layers + 1.4]) if final else body_rows
            at = np.zeros(len(chosen), int) if final else chosen["layer"].to_numpy(int)
            current = (chosen["role"] == "current").to_numpy()
            weights = chosen["weight"].to_numpy(float)
            grid = np.full((len(edges) - 1, columns), np.nan)
            newest = np.full((len(edges) - 1, 1), np.nan)
            grid[at[~current], chosen["source"].to_numpy(int)[~current]] = weights[~current]
            newest[at[current], 0] = weights[current]
            style: dict[str, Any] = {"vmin": 0, "vmax": 1, "cmap": "viridis", "edgecolors": "white", "linewidth": 0.3}
            for x_edges, values in ((np.arange(columns + 1.0), grid), (columns + np.array([0.4, 1.4]), newest)):
                mesh = axis.pcolormesh(x_edges, edges, np.ma.masked_invalid(values), **style)
            for row, column in zip(at, chosen["source"].to_numpy(int), strict=True):
                if (chosen["num_sources"].to_numpy(int)[at == row] == 1).all():
                    x = columns + 0.4 if current[at == row].all() else column
                    axis.add_patch(
                        Rectangle(
                            (x, edges[row]),
                            1,
                            edges[row + 1] - edges[row],
                            facecolor=plotting.PALE,
                            edgecolor="#b5b5b5",
                            hatch="////",
                            linewidth=0.3,
                        )
                    )
        step = -(-columns // 12)
        ticks = list(range(0, columns, step))
        names = ["emb" if t == 0 else str(t) for t in ticks]
        axis.set_xticks([t + 0.5 for t in ticks] + [columns + 0.9], [*names, "current"], fontsize=6.5)
        axis.set_title(f"before {words.sublayer_name(sublayer)}", color=plotting.GREY, fontsize=8)
        axis.set_xlim(-0.05, columns + 1.45)
        axis.set_xlabel("source")
        axis.tick_params(length=0)
        axis.spines[["left", "bottom"]].set_visible(False)
    axes[0].set_ylim(rows + 0.05, -0.05)
    every = -(-layers // 14)
    y_names = [str(k) for k in range(0, layers, every)] + (["final"] if has_final else [])
    axes[0].set_yticks([k + 0.5 for k in range(0, layers, every)] + ([layers + 0.9] if has_final else []), y_names)
    axes[0].set_ylabel("layer")
    plotting.heading(figure, plotting.label(title))
    if mesh is not None:
        bar = figure.colorbar(mesh, ax=list(axes), shrink=0.6, aspect=22, pad=0.02)
        bar.set_label("mean weight", fontsize=7.5)
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=2, labelsize=7)
    return figure


@plotting.styled
def analytic_lines(routing: pd.DataFrame, title: str) -> Figure:
    """A baseline's measured weights on the line that its schedule predicts, and how far off each read is.

    Args:
        routing: rows of one model: read, num_sources, source, weight, analytic (rows without one,
            and reads of a single source, are left out).
    """
    plotting.need(routing, ("read", "source", "num_sources", "weight", "analytic"), "plot against the analytic line")
    table = routing[routing["analytic"].notna() & (routing["num_sources"] > 1)].sort_values(["num_sources", "source"])
    figure = Figure(figsize=(4.5, 4.1), layout="constrained")
    top, bottom = figure.subplots(2, 1, height_ratios=(1.7, 1))
    newest = table["source"] == table["num_sources"] - 1
    blue, orange = plotting.SERIES[:2]
    groups = [("newest source", table[newest], orange), ("each other source", table[~newest], blue)]
    by_role = [g.groupby("num_sources")["analytic"].first() for _, g, _ in groups]
    both = by_role[0].index.intersection(by_role[1].index)
    if len(both) and np.allclose(by_role[0][both], by_role[1][both]):
        groups = [("every source", table, blue)]
    for name, group, (colour, marker) in groups:
        line = group.groupby("num_sources")["analytic"].first()
        top.plot(line.index, line.to_numpy(), color=colour, linewidth=1.1, label=f"{name}, analytic")
        top.plot(
            group["num_sources"],
            group["weight"],
            marker,
            color=colour,
            markersize=4.5,
            alpha=0.85,
            markerfacecolor="white",
            label=f"{name}, measured",
        )
    if len(table):
        top.set_yscale("log")
        top.set_ylim(min(0.05, float(table["weight"].min()) * 0.4), 1.7)
    top.yaxis.set_major_formatter(FuncFormatter(words.plain))
    top.yaxis.set_minor_locator(NullLocator())
    top.xaxis.set_major_locator(MaxNLocator(integer=True))
    top.set_xlabel("number of sources S")
    top.set_ylabel("mean weight")
    top.legend(loc="best", ncols=1)
    top.set_title(plotting.label(title), fontsize=9.5, fontweight="bold")
    floor = 1e-10
    off = (table["weight"] - table["analytic"]).abs().groupby(table["read"]).max().clip(lower=floor)
    bottom.vlines(off.index, floor, off.to_numpy(), color=blue[0], linewidth=0.8)
    bottom.plot(off.index, off.to_numpy(), "o", color=blue[0], markersize=3)
    # The largest deviation that the checks allow.
    limit = 1e-6
    bottom.axhline(limit, color=orange[0], linewidth=0.9, linestyle="--")
    bottom.annotate(
        f"limit {words.plain(limit)}",
        (1, limit),
        xycoords=("axes fraction", "data"),
        ha="right",
        va="bottom",
        fontsize=7,
        color=plotting.INK,
        xytext=(0, 1.5),
        textcoords="offset points",
    )
    bottom.set_yscale("log")
    bottom.set_ylim(floor * 0.5, max(limit, float(off.max()) if len(off) else floor) * 20)
    bottom.yaxis.set_major_formatter(FuncFormatter(words.plain))
    bottom.yaxis.set_minor_locator(NullLocator())
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
    bottom.set_xlabel("read (0 is the first attention read)")
    bottom.set_ylabel("largest\n|measured − analytic|")
    return figure

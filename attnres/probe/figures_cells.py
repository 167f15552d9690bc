"""Figures that compare cells: mass against effect, ranks, and forest plots over the equivalence band.

Pure functions from a table to a `Figure`, as in `figures`. Effects are in nats/token.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from attnres.probe.plotting import (
    BANDS,
    FAMILIES,
    FAMILY_COLOURS,
    GREY,
    INK,
    SERIES,
    SUBLAYER_MARKERS,
    SUBLAYER_NAMES,
    SUBLAYERS,
    effect_axis,
    label,
    luminance,
    need,
    number,
    ordered,
    styled,
)


@styled
def mass_effect_scatter(cells: pd.DataFrame, title: str, margin: float) -> Figure:
    """Effect of each cell against its raw mass (left) and against its norm-aware share (right).

    Colour is the family, shape the sublayer, the letter the band; a filled mark is a `causal` verdict. The
    rank correlation in each heading describes the points drawn and is not a test.

    Args:
        cells: rows of one model and one intervention, as in cells.csv; ineligible ones are left out.
        title: name of the model.
        margin: equivalence margin in nats/token, drawn as a band.
    """
    need(
        cells,
        (
            "family",
            "sublayer",
            "band",
            "eligible",
            "mass",
            "mass_lo",
            "mass_hi",
            "norm_share",
            "dnll",
            "dnll_lo",
            "dnll_hi",
            "verdict",
        ),
        "scatter of mass and effect",
    )
    table = cells[cells["eligible"].astype(bool)]
    figure = Figure(figsize=(7.6, 3.75), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    panels = (
        ("mass", "raw mass: mean routing weight of the family"),
        ("norm_share", "norm-aware share of the mix"),
    )
    for axis, (column, name) in zip(axes, panels, strict=True):
        effect_axis(axis, "y", [*table["dnll_lo"], *table["dnll_hi"], *table["dnll"]], margin)
        for record in table.to_dict("records"):
            x, y, colour = record[column], record["dnll"], FAMILY_COLOURS.get(record["family"], GREY)
            if column == "mass":
                axis.plot([record["mass_lo"], record["mass_hi"]], [y, y], color=GREY, linewidth=0.7, zorder=1)
            axis.plot([x, x], [record["dnll_lo"], record["dnll_hi"]], color=GREY, linewidth=0.7, zorder=1)
            filled = record["verdict"] == "causal"
            axis.plot(
                x,
                y,
                SUBLAYER_MARKERS.get(record["sublayer"], "D"),
                markersize=8.5,
                zorder=2,
                color=colour,
                markerfacecolor=colour if filled else "white",
                markeredgewidth=1.1,
            )
            ink = "white" if filled and luminance(colour) < 0.25 else INK
            axis.annotate(
                label(str(record["band"])[:1].upper(), 1),
                (x, y),
                ha="center",
                va="center_baseline",
                fontsize=5.8,
                color=ink,
                zorder=3,
                annotation_clip=False,
                in_layout=False,
            )
        pairs = table[[column, "dnll"]].dropna()
        rho = pairs[column].rank().corr(pairs["dnll"].rank()) if len(pairs) > 2 else np.nan
        heading = f"Spearman ρ = {rho:.2f}".replace("-", "−") if np.isfinite(rho) else "Spearman ρ undefined"
        axis.set_title(f"{heading} ({len(pairs)} cells)", color=GREY, fontsize=8)
        axis.set_xlabel(name)
        axis.margins(x=0.08)
    axes[0].set_ylabel("ΔNLL, nats/token")
    families = ordered(table["family"], FAMILIES)
    handles: list[Any] = [Patch(color=FAMILY_COLOURS.get(f, GREY), label=label(f, 14)) for f in families]
    for name, marker in SUBLAYER_MARKERS.items():
        handles.append(
            Line2D(
                [],
                [],
                marker=marker,
                linestyle="",
                color=INK,
                markerfacecolor="white",
                label=SUBLAYER_NAMES[name],
            )
        )
    handles.append(Line2D([], [], marker="o", linestyle="", color=INK, label="causal (filled)"))
    handles.append(Patch(color="#56B4E9", alpha=0.3, label=f"±{margin:g} nat margin"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, columnspacing=1.6, handletextpad=0.6)
    figure.suptitle(label(title), x=0.01, ha="left", fontsize=9.5, fontweight="bold")
    return figure


@styled
def rank_slopegraph(cells: pd.DataFrame, title: str) -> Figure:
    """The eligible cells ranked by mass, by norm-aware share and by effect, a line each, coloured by family.

    Args:
        cells: rows of one model and one intervention, as in cells.csv.
        title: name of the model.
    """
    need(
        cells,
        ("family", "sublayer", "band", "eligible", "mass", "norm_share", "dnll", "verdict"),
        "slopegraph",
    )
    table = cells[cells["eligible"].astype(bool)].dropna(subset=["mass", "norm_share", "dnll"])
    ranks = table[["mass", "norm_share", "dnll"]].rank(ascending=False, method="first")
    figure = Figure(figsize=(7.6, 0.9 + 0.2 * max(len(table), 4)), layout="constrained")
    axis = figure.subplots()
    for record, ranked in zip(table.to_dict("records"), ranks.to_numpy(), strict=True):
        colour = FAMILY_COLOURS.get(record["family"], GREY)
        filled = record["verdict"] == "causal"
        axis.plot(
            [0, 1, 2],
            ranked,
            color=colour,
            linewidth=1.6 if filled else 0.9,
            alpha=0.9,
            markersize=5,
            linestyle="-" if filled else (0, (3, 2)),
            marker=SUBLAYER_MARKERS.get(record["sublayer"], "D"),
            markerfacecolor=colour if filled else "white",
        )
        name = label(
            f"{record['family']} · {SUBLAYER_NAMES.get(record['sublayer'], record['sublayer'])} {record['band']}"
        )
        axis.text(-0.06, ranked[0], name, ha="right", va="center", fontsize=7, in_layout=False)
        axis.text(
            2.06,
            ranked[2],
            f"{name}  {number(record['dnll'])}",
            ha="left",
            va="center",
            fontsize=7,
            in_layout=False,
        )
    axis.set_xlim(-0.85, 3.05)
    axis.set_ylim(len(table) + 0.7, 0.3)
    axis.set_xticks([0, 1, 2], ["by raw mass", "by norm-aware share", "by effect"])
    axis.xaxis.tick_top()
    axis.tick_params(length=0)
    axis.set_yticks([])
    axis.spines[["left", "bottom"]].set_visible(False)
    figure.suptitle(label(title), x=0.01, ha="left", fontsize=9.5, fontweight="bold")
    return figure


@styled
def effect_forest(cells: pd.DataFrame, models: Sequence[str], margin: float) -> Figure:
    """Effect of every cell with its confidence interval, models side by side, over the equivalence band.

    Args:
        cells: rows of cells.csv of one intervention.
        models: order of the models; others follow.
        margin: equivalence margin in nats/token.
    """
    need(
        cells,
        ("model", "family", "sublayer", "band", "eligible", "dnll", "dnll_lo", "dnll_hi", "verdict"),
        "forest plot",
    )
    table = cells.rename(columns={"model": "series", "dnll": "mid", "dnll_lo": "low", "dnll_hi": "high"})
    return _forest(
        table.assign(filled=table["verdict"] == "causal"),
        models,
        margin,
        "ΔNLL, nats/token (edited − clean)",
        "causal (filled)",
    )


@styled
def contrast_forest(contrasts: pd.DataFrame, models: Sequence[str], margin: float) -> Figure:
    """Difference of effects, trained minus baseline, per cell and baseline, over the equivalence band.

    Args:
        contrasts: rows of contrasts.csv.
        models: order of all models, so that a baseline looks the same here as in `effect_forest`.
        margin: equivalence margin in nats/token.
    """
    need(
        contrasts,
        ("baseline", "family", "sublayer", "band", "diff", "diff_lo", "diff_hi", "verdict"),
        "forest plot of contrasts",
    )
    names = {"baseline": "series", "diff": "mid", "diff_lo": "low", "diff_hi": "high"}
    decided = contrasts["verdict"].isin(("trained larger", "baseline larger"))
    table = contrasts.rename(columns=names).assign(filled=decided, eligible=True)
    return _forest(
        table,
        models,
        margin,
        "difference of ΔNLL, nats/token (trained − baseline)",
        "larger or smaller (filled)",
    )


def _forest(table: pd.DataFrame, order: Sequence[str], margin: float, axis_name: str, filled_name: str) -> Figure:
    """One row per (sublayer, band, family), one mark per series; ineligible ones are named as excluded."""
    series = ordered(table["series"], order)
    keys = [
        (s, b, f)
        for s in ordered(table["sublayer"], SUBLAYERS)
        for b in ordered(table["band"], BANDS)
        for f in ordered(table["family"], FAMILIES)
    ]
    present = set(zip(table["sublayer"], table["band"], table["family"], strict=True))
    keys = [k for k in keys if k in present]
    figure = Figure(figsize=(7.6, 1.15 + (0.14 + 0.07 * len(series)) * max(len(keys), 2)), layout="constrained")
    axis = figure.subplots()
    used = table[table["eligible"].astype(bool)]
    effect_axis(axis, "x", [*used["low"], *used["high"], *used["mid"]], margin)
    groups = list(dict.fromkeys(k[:2] for k in keys))
    for row, key in enumerate(keys):
        if groups.index(key[:2]) % 2:
            axis.axhspan(row - 0.5, row + 0.5, color="#f5f5f5", linewidth=0, zorder=-1)
    found = {(r["series"], r["sublayer"], r["band"], r["family"]): r for r in table.to_dict("records")}
    looks = {name: SERIES[k % len(SERIES)] for k, name in enumerate(ordered([*order, *series], order))}
    for row, key in enumerate(keys):
        out = [name for name in series if (name, *key) in found and not found[(name, *key)]["eligible"]]
        if out:
            who = "all models" if len(out) == len(series) > 1 else ", ".join(label(name, 18) for name in out)
            axis.text(
                0.995,
                row,
                f"excluded: {who}",
                ha="right",
                va="center",
                fontsize=5.8,
                color=GREY,
                transform=axis.get_yaxis_transform(),
                in_layout=False,
            )
        for index, name in enumerate(series):
            record = found.get((name, *key))
            if record is None or name in out:
                continue
            y = row + (index - (len(series) - 1) / 2) * 0.7 / max(len(series), 1)
            colour, marker = looks[name]
            axis.plot([record["low"], record["high"]], [y, y], color=colour, linewidth=1.2)
            axis.plot(
                record["mid"],
                y,
                marker,
                color=colour,
                markersize=4.3,
                markeredgewidth=0.9,
                markerfacecolor=colour if record["filled"] else "white",
            )
    axis.set_ylim(len(keys) - 0.5, -0.5)
    names = [label(f"{f} · {SUBLAYER_NAMES.get(s, s)} {b}") for s, b, f in keys]
    axis.set_yticks(range(len(keys)), names, fontsize=7)
    axis.tick_params(axis="y", length=0)
    axis.spines["left"].set_visible(False)
    axis.set_xlabel(axis_name)
    handles: list[Any] = [
        Line2D(
            [],
            [],
            color=looks[name][0],
            marker=looks[name][1],
            markersize=4.5,
            markerfacecolor="white",
            label=label(name, 20),
        )
        for name in series
    ]
    handles.append(Line2D([], [], color=INK, marker="o", linestyle="", markersize=4.5, label=filled_name))
    handles.append(Patch(color="#56B4E9", alpha=0.3, label=f"equivalence band ±{margin:g}"))
    figure.legend(handles=handles, loc="outside upper center", ncols=min(5, len(handles)))
    return figure

"""What the figures of the report share: style, orders, headings, legends, marks, the scale of effects, SVG output.

Colours: viridis for weights, a blue-red map that colour-blind readers can tell apart for signed effects, dark ones
in the manner of Okabe and Ito for categories; a shape, a fill or a word repeats whatever a colour says.
"""

import functools
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ParamSpec

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import SymLogNorm, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from attnres.depth.places import BANDS, NUMBERED, place_kind
from attnres.errors import DataError
from attnres.report.words import plain
from attnres.tables.names import MASK, Verdict

# From what is given to what is newest.
DRAWN_FAMILIES = ("embedding", "older", "recent", "current")

INK, GREY, PALE = "#1b1b1b", "#636363", "#e9e9e9"
BAND_COLOUR = "#56B4E9"  # of the equivalence band; a label says the same
# Each has 3:1 against white at least, and a marker of its own.
FAMILY_COLOURS = {
    "embedding": "#0072B2",
    "older": "#882255",
    "recent": "#008A64",
    "current": "#D55E00",
    "read": "#4d4d4d",
}
FAMILY_MARKERS = {"embedding": "o", "older": "s", "recent": "D", "current": "^", "read": "P"}
SERIES = (
    ("#0072B2", "o"),
    ("#D55E00", "s"),
    ("#008A64", "D"),
    ("#882255", "^"),
    ("#8A6D00", "v"),
    ("#4d4d4d", "P"),
)
VERDICT_SIGNS = {Verdict.CAUSAL: "●", Verdict.NEGLIGIBLE: "≡", Verdict.INCONCLUSIVE: "○"}

_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 8.0,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 8.5,
    "axes.labelsize": 8.0,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "figure.dpi": 288,
    "text.hinting": "no_hinting",
    "savefig.facecolor": "white",
    "hatch.linewidth": 0.5,
    "svg.fonttype": "path",
    "svg.hashsalt": "attnres",
}
_P = ParamSpec("_P")
_DOSE = re.compile(r"scale:([0-9.eE+-]+)")


def styled(draw: Callable[_P, Figure]) -> Callable[_P, Figure]:
    """Runs `draw` under the house style and lays the figure out; matplotlib's own settings stay."""

    @functools.wraps(draw)
    def inner(*args: _P.args, **kwargs: _P.kwargs) -> Figure:
        with matplotlib.rc_context(_STYLE):
            figure = draw(*args, **kwargs)
            # Laid out once, here: left to `savefig`, the engine runs twice and the figure is drawn twice.
            engine = figure.get_layout_engine()
            if engine is not None:
                engine.execute(figure)
                figure.set_layout_engine(None)
            return figure

    return inner


def to_svg(figure: Figure) -> str:
    """Renders a figure as SVG text: the same text for the same figure, with nothing external in it."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    # The document type names a DTD on the web; nobody needs it, and the report promises nothing external.
    return re.sub(r"<!DOCTYPE.*?>\s*", "", buffer.getvalue().decode("utf-8"), count=1, flags=re.DOTALL)


def label(text: object, width: int = 32) -> str:
    """A name as it may stand in a figure: printable characters only, on one line, at most `width` long."""
    clean = "".join(c if c.isprintable() else " " for c in str(text))
    return clean if len(clean) <= width else clean[: width - 1] + "…"


def ordered(values: Iterable[str], canonical: Sequence[str]) -> list[str]:
    """The distinct `values`, those of `canonical` first and in its order, the others as they came."""
    present = list(dict.fromkeys(values))
    return [v for v in canonical if v in present] + [v for v in present if v not in canonical]


def place_tick(place: str) -> str:
    """A place in a letter or a number: `E` for early, `7` for layer7."""
    numbered = NUMBERED.fullmatch(place)
    return numbered[2] if numbered else label(place[:1].upper(), 1)


def ordered_places(values: Iterable[str]) -> list[str]:
    """The distinct places from the input to the output: bands, then layers, blocks and reads by their number."""
    kinds = ("band", "composition", "other", "layer", "block", "read")

    def depth(place: str) -> tuple[int, int]:
        numbered = NUMBERED.fullmatch(place)
        return kinds.index(place_kind(place)), int(numbered[2]) if numbered else 0

    return sorted(ordered(values, BANDS), key=depth)


def dose(intervention: str) -> float | None:
    """The factor x on a family's odds: of `scale:x`, and 0 of `mask`; None of any other intervention."""
    if intervention == MASK:
        return 0.0
    scaled = _DOSE.fullmatch(intervention)
    try:
        value = float(scaled[1]) if scaled else float("nan")
    except ValueError:
        return None
    return value if np.isfinite(value) and value >= 0 else None


def effect_limit(cells: pd.DataFrame, margin: float) -> float:
    """The common end of the effect scale: the largest absolute effect of any model, beyond the margin."""
    largest = pd.to_numeric(cells["dnll"], errors="coerce").abs().max()
    return float(max(largest if np.isfinite(largest) else 0.0, 4 * margin))


def need(table: pd.DataFrame, columns: Sequence[str], figure: str) -> None:
    missing = [c for c in columns if c not in table.columns]
    if missing:
        raise DataError(f"the {figure} needs the column '{missing[0]}', which its table lacks; run the probe again")


def heading(figure: Figure, text: str) -> None:
    """The name of a figure, above it at the left."""
    figure.suptitle(text, x=0.01, ha="left", fontsize=9.5, fontweight="bold")


def family_look(family: str) -> tuple[str, str]:
    """Colour and marker of a family."""
    return FAMILY_COLOURS.get(family, GREY), FAMILY_MARKERS.get(family, "X")


def series_look(index: int) -> tuple[str, str]:
    """Colour and marker of the models, runs or places of a figure by their number."""
    return SERIES[index % len(SERIES)]


def legend_marks(names: Iterable[str], looks: Iterable[tuple[str, str]], size: float, **style: Any) -> list[Any]:
    """What a legend says of each name: its colour and marker, hollow.

    Args:
        style: of the line, where it is not solid.
    """
    return [
        Line2D([], [], color=colour, marker=marker, markersize=size, markerfacecolor="white", label=name, **style)
        for name, (colour, marker) in zip(names, looks, strict=True)
    ]


def legend_families(families: Sequence[str], size: float, **style: Any) -> list[Any]:
    """`legend_marks` of families."""
    return legend_marks([label(f, 14) for f in families], map(family_look, families), size, **style)


def legend_ends(filled: str, band: str, size: float | None = 4) -> list[Any]:
    """What every legend of effects ends with: what a filled mark is, and the equivalence band."""
    mark = Line2D([], [], color=INK, marker="o", linestyle="", markersize=size, label=filled)
    return [mark, Patch(color=BAND_COLOUR, alpha=0.3, label=band)]


def effect_mark(axis: Axes, x: float, record: Mapping[Any, Any], look: tuple[str, str], size: float) -> None:
    """An effect at `x` over its interval, filled where the verdict is `causal`."""
    colour, marker = look
    axis.plot([x, x], [record["dnll_lo"], record["dnll_hi"]], color=colour, linewidth=1)
    face = colour if record["verdict"] == Verdict.CAUSAL else "white"
    axis.plot(x, record["dnll"], marker, color=colour, markersize=size, markerfacecolor=face)


def effect_norm(limit: float, margin: float) -> SymLogNorm:
    return SymLogNorm(linthresh=margin, linscale=0.6, vmin=-limit, vmax=limit, base=10)


def decades(limit: float, margin: float) -> list[float]:
    """Tick positions of a scale that is linear within the margin: zero and the powers of ten outside it."""
    ends = [10.0**k for k in range(int(np.ceil(np.log10(margin) + 1e-9)), int(np.floor(np.log10(limit) + 1e-9)) + 1)]
    ends = ends or [float(f"{limit:.1g}")]
    return [-e for e in reversed(ends)] + [0.0, *ends]


def effect_axis(axis: Axes, which: str, values: Iterable[float], margin: float) -> None:
    """Gives one axis of a plot the effect scale: linear within the margin, logarithmic beyond it."""
    finite = [v for v in values if np.isfinite(v)] or [0.0]
    low, high = min(*finite, -2 * margin), max(*finite, 2 * margin)
    getattr(axis, f"set_{which}scale")("symlog", linthresh=margin, linscale=0.6, base=10)
    getattr(axis, f"set_{which}lim")(low * 1.35, high * 1.35)
    scale = getattr(axis, f"{which}axis")
    scale.set_major_locator(FixedLocator([t for t in decades(max(-low, high), margin) if low <= t <= high]))
    scale.set_minor_locator(NullLocator())
    scale.set_major_formatter(FuncFormatter(plain))
    span = axis.axhspan if which == "y" else axis.axvspan
    span(-margin, margin, color=BAND_COLOUR, alpha=0.20, linewidth=0, zorder=0)
    line = axis.axhline if which == "y" else axis.axvline
    line(0, color=GREY, linewidth=0.6, zorder=0.5)


def effect_bar(figure: Figure, axis: Axes | list[Axes], norm: SymLogNorm, margin: float) -> None:
    bar = figure.colorbar(ScalarMappable(norm, "RdBu_r"), ax=axis, aspect=18, pad=0.015, fraction=0.06)
    bar.set_ticks(decades(float(norm.vmax or 1.0), margin))
    bar.ax.yaxis.set_major_formatter(FuncFormatter(plain))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.tick_params(length=2, labelsize=7)
    bar.set_label("ΔNLL, nats/token", fontsize=7.5)
    bar.outline.set_visible(False)


def luminance(colour: Any) -> float:
    """Relative luminance (WCAG) of a colour that matplotlib knows, to choose ink that can be read on it."""
    rgb: np.ndarray = np.asarray(to_rgb(colour), dtype=np.float64)
    linear = np.where(rgb <= 0.03928, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return float(linear @ np.array([0.2126, 0.7152, 0.0722]))


def ink_on(colour: Any) -> str:
    """Black or white, whichever reads better on a colour: at least 4.5:1 on any."""
    return "white" if luminance(colour) < 0.179 else "black"

"""What the figures of the probe share: house style, names, number formats, the scale of effects, SVG output.

Colours: viridis for weights, a blue-red map that colour-blind readers can tell apart for signed effects, dark ones
in the manner of Okabe and Ito for categories; a shape, a fill or a word repeats whatever a colour says.
"""

import functools
import io
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ParamSpec

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import SymLogNorm, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from attnres.depth.places import BANDS, place_kind
from attnres.errors import DataError

# From what is given to what is newest.
DRAWN_FAMILIES = ("embedding", "older", "recent", "current")
SUBLAYER_NAMES = {"attn": "attention", "mlp": "MLP", "final": "final read", "": "single reads"}

INK, GREY, PALE = "#1b1b1b", "#636363", "#e9e9e9"
BAND_COLOUR = "#56B4E9"  # of the equivalence band; nothing is told by it alone
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
VERDICT_SIGNS = {"causal": "●", "null": "≡", "inconclusive": "○"}

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
_PLACE = re.compile(r"(layer|block|read)(\d{1,6})")
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
    found = _PLACE.fullmatch(place)
    return found[2] if found else label(place[:1].upper(), 1)


def ordered_places(values: Iterable[str]) -> list[str]:
    """The distinct places from the input to the output: bands, then layers, blocks and reads by their number."""
    kinds = ("band", "composition", "other", "layer", "block", "read")

    def depth(place: str) -> tuple[int, int]:
        found = _PLACE.fullmatch(place)
        return kinds.index(place_kind(place)), int(found[2]) if found else 0

    return sorted(ordered(values, BANDS), key=depth)


def dose(intervention: str) -> float | None:
    """The factor x on a family's odds: of `scale:x`, and 0 of `mask`; None of any other intervention."""
    if intervention == "mask":
        return 0.0
    found = _DOSE.fullmatch(intervention)
    try:
        value = float(found[1]) if found else float("nan")
    except ValueError:
        return None
    return value if np.isfinite(value) and value >= 0 else None


def number(value: float) -> str:
    """An effect for a reader: signed, three or four decimals, a true minus sign; an en dash for none."""
    if not np.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    size = abs(value)
    form = "+.1e" if size < 5e-5 else "+.4f" if size < 0.1 else "+.3f" if size < 10 else "+.1f"
    return re.sub(r"e([+−])0*(\d)", r"e\1\2", f"{value:{form}}".replace("-", "−"))


def effect_limit(cells: pd.DataFrame, margin: float) -> float:
    """The common end of the effect scale: the largest absolute effect of any model, beyond the margin."""
    largest = pd.to_numeric(cells["dnll"], errors="coerce").abs().max()
    return float(max(largest if np.isfinite(largest) else 0.0, 4 * margin))


def need(table: pd.DataFrame, columns: Sequence[str], figure: str) -> None:
    missing = [c for c in columns if c not in table.columns]
    if missing:
        raise DataError(f"the {figure} needs the column '{missing[0]}', which its table lacks; run the probe again")


def effect_norm(limit: float, margin: float) -> SymLogNorm:
    return SymLogNorm(linthresh=margin, linscale=0.6, vmin=-limit, vmax=limit, base=10)


def decades(limit: float, margin: float) -> list[float]:
    """Tick positions of a scale that is linear within the margin: zero and the powers of ten outside it."""
    ends = [10.0**k for k in range(int(np.ceil(np.log10(margin) + 1e-9)), int(np.floor(np.log10(limit) + 1e-9)) + 1)]
    ends = ends or [float(f"{limit:.1g}")]
    return [-e for e in reversed(ends)] + [0.0, *ends]


def plain(value: float, _position: object = None) -> str:
    """A number on an axis or in a table, without padding in its exponent: 0.1, −2, 1e−6."""
    return re.sub(r"e([+−])0*(\d)", r"e\1\2", f"{value:.3g}".replace("-", "−"))


def effect_axis(axis: Axes, which: str, values: Iterable[float], margin: float) -> None:
    """Gives one axis of a plot the effect scale: linear within the margin, logarithmic beyond it."""
    finite = [v for v in values if np.isfinite(v)] or [0.0]
    low, high = min(*finite, -2 * margin), max(*finite, 2 * margin)
    getattr(axis, f"set_{which}scale")("symlog", linthresh=margin, linscale=0.6, base=10)
    getattr(axis, f"set_{which}lim")(low * 1.35, high * 1.35)
    part = getattr(axis, f"{which}axis")
    part.set_major_locator(FixedLocator([t for t in decades(max(-low, high), margin) if low <= t <= high]))
    part.set_minor_locator(NullLocator())
    part.set_major_formatter(FuncFormatter(plain))
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

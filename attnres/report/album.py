"""Which figures a report has: `FIGURES` names the section of each, its builder, and what it is drawn of.

A new figure is a builder in `attnres.report.figures`; a line in `FIGURES`, with a function that takes its rows from
`attnres.report.tables.Tables` (`cells.csv`, `contrasts.csv`, `routing.csv` of the probe's folder); and a place in a
template (`templates/figures.html.j2`), which shows `drawings.<section>`. Comparisons have a list of their own in
`attnres.report.comparison`.
"""

import base64
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

from matplotlib.figure import Figure

from attnres.depth.places import WHOLE_READ
from attnres.report import words
from attnres.report.figures import cells as cell_figures
from attnres.report.figures import doses, effects, forest, maps, plotting
from attnres.report.tables import Tables

_Source = TypeVar("_Source")


@dataclass(frozen=True)
class Drawing:
    """A figure for the report: file stem, SVG text, and what it shows, in words."""

    stem: str
    svg: str
    alt: str

    @property
    def uri(self) -> str:
        """The figure as an address that a page can hold."""
        return "data:image/svg+xml;base64," + base64.b64encode(self.svg.encode("utf-8")).decode("ascii")


@dataclass(frozen=True)
class Plate:
    """One figure of a section that may have several.

    Attributes:
        name: the end of the file's stem, after the section; may be empty.
        alt: what the figure shows, in words.
        arguments: of its builder.
    """

    name: str
    alt: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class FigureEntry(Generic[_Source]):
    """The figures of one section.

    Attributes:
        plates: what is drawn of the source, the tables of a probe for example; nothing where there is nothing to show.
    """

    section: str
    builder: Callable[..., Figure]
    plates: Callable[[_Source], Iterator[Plate]]


def draw(entries: Sequence[FigureEntry[_Source]], source: _Source) -> dict[str, list[Drawing]]:
    """Every figure, by section; a section may be empty."""
    drawings: dict[str, list[Drawing]] = {}
    for entry in entries:
        drawn = drawings.setdefault(entry.section, [])
        for plate in entry.plates(source):
            stem = f"{entry.section}-{plate.name}" if plate.name else entry.section
            svg = plotting.to_svg(entry.builder(**plate.arguments))
            drawn.append(Drawing(stem, svg, " ".join(words.visible(plate.alt).split())))
    return drawings


def _models(tables: Tables) -> Iterator[tuple[str, str]]:
    """Each model, and its name in files."""
    for index, model in enumerate(tables.models):
        yield model, f"{index}-{words.slug(model)}"


def _routing(tables: Tables) -> Iterator[Plate]:
    for model, name in _models(tables):
        reads = tables.routing[tables.routing["model"] == model]
        if len(reads):
            means = reads[reads["num_sources"] > 1].groupby("role")["weight"].mean()
            roles = plotting.ordered(means.index, plotting.DRAWN_FAMILIES)
            text = ", ".join(f"{role} {means[role]:.2f}" for role in roles)
            alt = f"{model}: routing weight by layer and source; mean weight of a source by family: {text}."
            yield Plate(name, alt, {"routing": reads, "title": model})


def _analytic(tables: Tables) -> Iterator[Plate]:
    for model, name in _models(tables):
        reads = tables.routing[tables.routing["model"] == model]
        known = reads[reads["analytic"].notna() & (reads["num_sources"] > 1)]
        if len(known):
            worst = (known["weight"] - known["analytic"]).abs().max()
            alt = f"{model}: measured weights on the analytic line; the largest deviation is {worst:.1e}."
            yield Plate(name, alt, {"routing": reads, "title": model})


def _maps(tables: Tables, along_depth: bool | None = None) -> Iterator[Plate]:
    """Maps of effects of every model: of the main intervention over bands or along the depth, or all of the others."""
    cells, margin = tables.cells, tables.margin
    main = along_depth is not None
    interventions = [kind for kind in tables.interventions if (kind == tables.intervention) == main]
    limit = plotting.effect_limit(cells[cells["eligible"]], margin)
    for model, name in _models(tables):
        for kind in interventions:
            mine = cells[(cells["model"] == model) & (cells["intervention"] == kind) & (cells["family"] != WHOLE_READ)]
            several = len(tables.interventions) > 1
            heading, stem = (f"{model}: {kind}", f"{name}-{words.slug(kind)}") if several else (model, name)
            for deep in (along_depth,) if main else (False, True):
                rows = mine[mine["band"].map(effects.along_depth) == deep]
                if rows.empty:
                    continue
                counts = ", ".join(f"{n} {verdict}" for verdict, n in rows["verdict"].value_counts(sort=False).items())
                where = "sublayer and place along the depth" if deep else "sublayer and band"
                alt = f"{heading}: effect by family, {where}; {counts}. The values are in the table of cells."
                suffix = "-depth" if deep and not main else ""
                yield Plate(stem + suffix, alt, {"cells": rows, "title": heading, "limit": limit, "margin": margin})


def _scatter(tables: Tables) -> Iterator[Plate]:
    for model, name in _models(tables):
        mine = tables.primary[tables.primary["model"] == model]
        if mine["eligible"].any():
            alt = (
                f"{model}: effect against raw mass, norm-aware share and displacement, {mine['eligible'].sum()} cells; "
                "the values are in the table of cells."
            )
            yield Plate(name, alt, {"cells": mine, "title": model, "margin": tables.margin})


def _ranks(tables: Tables) -> Iterator[Plate]:
    for model, name in _models(tables):
        mine = tables.primary[tables.primary["model"] == model]
        if model == tables.trained and mine["eligible"].any():
            alt = f"{model}: cells ranked by raw mass, by norm-aware share, by displacement and by effect."
            yield Plate(name, alt, {"cells": mine, "title": model})


def _forest(tables: Tables) -> Iterator[Plate]:
    alt = f"Effects with 95% intervals of every cell and model against the band of ±{tables.margin:g} nats/token."
    yield Plate("", alt, {"cells": tables.primary, "models": tables.models, "margin": tables.margin})


def _controls(tables: Tables) -> Iterator[Plate]:
    """The trained model's cells under every intervention on a family, side by side."""
    kinds = [kind for kind in tables.interventions if plotting.dose(kind) in (None, 0.0)]
    mine = tables.cells[(tables.cells["model"] == tables.trained) & (tables.cells["family"] != WHOLE_READ)]
    side = mine[mine["intervention"].isin(kinds)]
    if side["intervention"].nunique() > 1:
        names, margin = ", ".join(kinds), tables.margin
        alt = f"{tables.trained}: effects of {names} side by side in every cell, against ±{margin:g} nat."
        yield Plate("", alt, {"cells": side, "models": kinds, "margin": margin, "by": "intervention"})


def _doses(tables: Tables) -> Iterator[Plate]:
    for model, name in _models(tables):
        mine = tables.cells[tables.cells["model"] == model]
        factors = {dose for dose in map(plotting.dose, mine["intervention"].unique()) if dose}
        if factors:
            text = ", ".join(f"{factor:g}" for factor in sorted(factors))
            alt = f"{model}: effect of scaling a family's odds by {text} and by 0."
            yield Plate(name, alt, {"cells": mine, "title": model, "margin": tables.margin})


def _ladder(tables: Tables) -> Iterator[Plate]:
    for model, name in _models(tables):
        mine = tables.cells[tables.cells["model"] == model]
        whole = doses.rungs(mine)
        if whole["eligible"].any():
            kinds = ", ".join(dict.fromkeys(whole["intervention"]))
            alt = f"{model}: loss over the clean run when whole reads are replaced: {kinds}."
            yield Plate(name, alt, {"cells": mine, "title": model, "margin": tables.margin})


def _contrasts(tables: Tables) -> Iterator[Plate]:
    contrasts = tables.primary_contrasts
    if len(contrasts):
        alt = f"Trained minus baseline effect of every shared cell against the band of ±{tables.margin:g} nats/token."
        yield Plate("", alt, {"contrasts": contrasts, "models": tables.models, "margin": tables.margin})


FIGURES: tuple[FigureEntry[Tables], ...] = (
    FigureEntry("routing", maps.routing_heatmap, _routing),
    FigureEntry("analytic", maps.analytic_lines, _analytic),
    FigureEntry("effects", effects.effect_map, partial(_maps, along_depth=False)),
    FigureEntry("depth", effects.place_map, partial(_maps, along_depth=True)),
    FigureEntry("others", effects.any_map, _maps),
    FigureEntry("scatter", cell_figures.mass_effect_scatter, _scatter),
    FigureEntry("ranks", cell_figures.rank_slopegraph, _ranks),
    FigureEntry("forest", forest.effect_forest, _forest),
    FigureEntry("controls", forest.effect_forest, _controls),
    FigureEntry("doses", doses.dose_response, _doses),
    FigureEntry("ladder", doses.read_ladder, _ladder),
    FigureEntry("contrasts", forest.contrast_forest, _contrasts),
)

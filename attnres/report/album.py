"""Which figures a report has, section by section, each with a text for those who cannot see it."""

import base64
from dataclasses import dataclass

import pandas as pd
from matplotlib.figure import Figure

from attnres.depth.places import place_kind
from attnres.report import words as words
from attnres.report.figures import cells as figures_cells
from attnres.report.figures import doses as figures_doses
from attnres.report.figures import effects as figures_effects
from attnres.report.figures import forest as figures_forest
from attnres.report.figures import maps as figures
from attnres.report.figures import plotting
from attnres.report.tables import Tables

SECTIONS = (
    "routing",
    "analytic",
    "effects",
    "depth",
    "others",
    "scatter",
    "ranks",
    "forest",
    "controls",
    "doses",
    "ladder",
    "contrasts",
)


@dataclass(frozen=True)
class Drawing:
    """A figure for the report: file stem, SVG text, and what it shows, in words."""

    stem: str
    svg: str
    alt: str

    @property
    def uri(self) -> str:
        return "data:image/svg+xml;base64," + base64.b64encode(self.svg.encode("utf-8")).decode("ascii")


class Album:
    """Drawings by section, in the order in which they were added."""

    def __init__(self, sections: tuple[str, ...]) -> None:
        self.drawings: dict[str, list[Drawing]] = {name: [] for name in sections}

    def add(self, section: str, name: str, figure: Figure, alt: str) -> None:
        stem = f"{section}-{name}" if name else section
        self.drawings[section].append(Drawing(stem, plotting.to_svg(figure), " ".join(words.visible(alt).split())))


def draw(tables: Tables) -> dict[str, list[Drawing]]:
    """Every figure of the report, by section."""
    album, margin, models = Album(SECTIONS), tables.margin, tables.models
    for index, model in enumerate(models):
        name = f"{index}-{words.slug(model)}"
        _draw_routing(album, tables.routing[tables.routing["model"] == model], model, name)
        _draw_effects(album, tables, model, name)
        part = tables.primary[tables.primary["model"] == model]
        if part["eligible"].any():
            _draw_mass(album, part, model, name, margin, ranked=model == tables.trained)
        _draw_series(album, tables.cells[tables.cells["model"] == model], model, name, margin)
    mine = tables.cells[(tables.cells["model"] == tables.trained) & (tables.cells["family"] != "read")]
    kinds = [k for k in tables.interventions if plotting.dose(k) in (None, 0.0)]
    side = mine[mine["intervention"].isin(kinds)]
    if side["intervention"].nunique() > 1:
        figure = figures_forest.effect_forest(side, kinds, margin, by="intervention")
        alt = f"{tables.trained}: effects of {', '.join(kinds)} side by side in every cell, against ±{margin:g} nat."
        album.add("controls", "", figure, alt)
    album.add(
        "forest",
        "",
        figures_forest.effect_forest(tables.primary, models, margin),
        f"Effects with 95% intervals of every cell and model against the band of ±{margin:g} nats/token.",
    )
    if len(tables.primary_contrasts):
        figure = figures_forest.contrast_forest(tables.primary_contrasts, models, margin)
        alt = f"Trained minus baseline effect of every shared cell against the band of ±{margin:g} nats/token."
        album.add("contrasts", "", figure, alt)
    return album.drawings


def _draw_routing(album: Album, reads: pd.DataFrame, model: str, name: str) -> None:
    if len(reads):
        means = reads[reads["num_sources"] > 1].groupby("role")["weight"].mean()
        text = ", ".join(f"{role} {means[role]:.2f}" for role in plotting.ordered(means.index, plotting.DRAWN_FAMILIES))
        alt = f"{model}: routing weight by layer and source; mean weight of a source by family: {text}."
        album.add("routing", name, figures.routing_heatmap(reads, model), alt)
    known = reads[reads["analytic"].notna() & (reads["num_sources"] > 1)]
    if len(known):
        worst = (known["weight"] - known["analytic"]).abs().max()
        alt = f"{model}: measured weights on the analytic line; the largest deviation is {worst:.1e}."
        album.add("analytic", name, figures.analytic_lines(reads, model), alt)


def _draw_effects(album: Album, tables: Tables, model: str, name: str) -> None:
    """Maps of the effects: the main intervention in the open, the others apart."""
    cells, margin = tables.cells, tables.margin
    limit = plotting.effect_limit(cells[cells["eligible"]], margin)
    several = len(tables.interventions) > 1
    for kind in tables.interventions:
        part = cells[(cells["model"] == model) & (cells["intervention"] == kind) & (cells["family"] != "read")]
        heading, stem = (f"{model}: {kind}", f"{name}-{words.slug(kind)}") if several else (model, name)
        for along_depth in (False, True):
            rows = part[part["band"].map(_along_depth) == along_depth]
            if rows.empty:
                continue
            counts = ", ".join(f"{n} {v}" for v, n in rows["verdict"].value_counts(sort=False).items())
            where = "sublayer and place along the depth" if along_depth else "sublayer and band"
            alt = f"{heading}: effect by family, {where}; {counts}. The values are in the table of cells."
            form = figures_effects.place_map if along_depth else figures_effects.effect_map
            section = "others" if kind != tables.intervention else "depth" if along_depth else "effects"
            suffix = "-depth" if along_depth and section == "others" else ""
            album.add(section, stem + suffix, form(rows, heading, limit, margin), alt)


def _along_depth(place: str) -> bool:
    return place_kind(place) in ("layer", "block", "read")


def _draw_mass(album: Album, part: pd.DataFrame, model: str, name: str, margin: float, ranked: bool) -> None:
    alt = (
        f"{model}: effect against raw mass, norm-aware share and displacement, {part['eligible'].sum()} cells; "
        "the values are in the table of cells."
    )
    album.add("scatter", name, figures_cells.mass_effect_scatter(part, model, margin), alt)
    if ranked:
        alt = f"{model}: cells ranked by raw mass, by norm-aware share, by displacement and by effect."
        album.add("ranks", name, figures_cells.rank_slopegraph(part, model), alt)


def _draw_series(album: Album, cells: pd.DataFrame, model: str, name: str, margin: float) -> None:
    """What only some runs have: several doses, interventions on whole reads."""
    doses = {d for d in map(plotting.dose, cells["intervention"].unique()) if d}
    if doses:
        alt = f"{model}: effect of scaling a family's odds by {', '.join(f'{d:g}' for d in sorted(doses))} and by 0."
        album.add("doses", name, figures_doses.dose_response(cells, model, margin), alt)
    whole = figures_doses.rungs(cells)
    if whole["eligible"].any():
        kinds = ", ".join(dict.fromkeys(whole["intervention"]))
        alt = f"{model}: loss over the clean run when whole reads are replaced: {kinds}."
        album.add("ladder", name, figures_doses.read_ladder(cells, model, margin), alt)

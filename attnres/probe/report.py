"""The report of a probe: the tables in a folder become report.html, report.md and figures/.

No model is loaded and nothing is recomputed that a table already says: `python -m attnres.probe.report DIR`
draws the report of an old run again, and gives the same bytes. The HTML is one file with its figures inside,
runs no script, and may load nothing (its content-security policy says so); everything from a table is
escaped, because a token, a path or a configuration may hold anything. Effects are in nats/token.
"""

import argparse
import base64
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import pandas as pd
from markupsafe import Markup
from matplotlib.figure import Figure

from attnres.errors import AttnResError, ConfigError, StorageError
from attnres.probe import figures, figures_cells, plotting
from attnres.probe import report_text as words
from attnres.probe.report_tables import Tables, one_line, read_tables


@dataclass(frozen=True)
class Drawing:
    """A figure for the report: file stem, SVG text, and what it shows, in words."""

    stem: str
    svg: str
    alt: str

    @property
    def uri(self) -> str:
        return "data:image/svg+xml;base64," + base64.b64encode(self.svg.encode("utf-8")).decode("ascii")


def draw(tables: Tables) -> dict[str, list[Drawing]]:
    """Every figure of the report, by section."""
    models, margin, trained = tables.models, tables.margin, tables.trained
    cells, routing, contrasts = tables.cells, tables.routing, tables.contrasts
    limit = plotting.effect_limit(cells[cells["eligible"]], margin)
    kinds = tables.interventions
    out: dict[str, list[Drawing]] = {
        k: [] for k in ("routing", "analytic", "effects", "scatter", "ranks", "forest", "contrasts")
    }

    def add(section: str, name: str, figure: Figure, alt: str) -> None:
        out[section].append(Drawing(f"{section}-{name}" if name else section, plotting.to_svg(figure), alt))

    for index, model in enumerate(models):
        name, reads = f"{index}-{words.slug(model)}", routing[routing["model"] == model]
        if len(reads):
            add("routing", name, figures.routing_heatmap(reads, model), _say_routing(model, reads))
        known = reads[reads["analytic"].notna() & (reads["num_sources"] > 1)]
        if len(known):
            worst = (known["weight"] - known["analytic"]).abs().max()
            add(
                "analytic",
                name,
                figures.analytic_lines(reads, model),
                f"{model}: measured weights on the analytic line; the largest deviation is {worst:.1e}.",
            )
        for kind in kinds:
            part = cells[(cells["model"] == model) & (cells["intervention"] == kind)]
            if len(part):
                heading, stem = (model, name) if len(kinds) == 1 else (f"{model}: {kind}", f"{name}-{words.slug(kind)}")
                add(
                    "effects",
                    stem,
                    figures.effect_map(part, heading, limit, margin),
                    _say_effects(heading, part),
                )
        part = cells[(cells["model"] == model) & (cells["intervention"] == tables.intervention)]
        if part["eligible"].any():
            add(
                "scatter",
                name,
                figures_cells.mass_effect_scatter(part, model, margin),
                f"{model}: effect against raw mass and against norm-aware share, {part['eligible'].sum()} "
                "cells; the values are in the table of cells.",
            )
            if model == trained:
                add(
                    "ranks",
                    name,
                    figures_cells.rank_slopegraph(part, model),
                    f"{model}: cells ranked by raw mass, by norm-aware share and by effect.",
                )
    part = cells[cells["intervention"] == tables.intervention]
    add(
        "forest",
        "",
        figures_cells.effect_forest(part, models, margin),
        f"Effects with 95% intervals of every cell and model against the band of ±{margin:g} nats/token.",
    )
    if len(contrasts):
        add(
            "contrasts",
            "",
            figures_cells.contrast_forest(contrasts, models, margin),
            f"Trained minus baseline effect of every shared cell against the band of ±{margin:g} nats/token.",
        )
    return out


def _say_routing(model: str, reads: pd.DataFrame) -> str:
    means = reads[reads["num_sources"] > 1].groupby("role")["weight"].mean()
    text = ", ".join(f"{role} {means[role]:.2f}" for role in plotting.ordered(means.index, plotting.FAMILIES))
    return f"{model}: routing weight by layer and source; mean weight of a source by family: {text}."


def _say_effects(heading: str, part: pd.DataFrame) -> str:
    counts = ", ".join(f"{n} {v}" for v, n in part["verdict"].value_counts(sort=False).items())
    return f"{heading}: effect by family, sublayer and band; {counts}. The values are in the table of cells."


def _environment(autoescape: bool) -> jinja2.Environment:
    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=autoescape,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    env.filters |= {
        "nats": words.nats,
        "share": words.share,
        "p": words.probability,
        "count": words.count,
        "slug": words.slug,
        "md": words.markdown,
        "indented": lambda v: json.dumps(v, indent=2, ensure_ascii=False, default=str),
    }
    env.globals |= {
        "interval": words.interval,
        "cell_name": words.cell_name,
        "table": words.markdown_table,
        "sublayers": plotting.SUBLAYER_NAMES,
        "measures": {"mass": "raw mass", "norm_share": "norm-aware share", "displacement": "displacement"},
    }
    return env


def write_report(folder: Path) -> Path:
    """Draws report.html, report.md and figures/*.svg from the tables in `folder`; returns the first's path.

    The same tables give the same bytes.

    Raises:
        ConfigError: the folder does not exist, or a target leads out of it.
        DataError: a table or a column is missing or unreadable.
        StorageError: the report cannot be written.
    """
    folder = Path(folder)
    tables = read_tables(folder)
    drawings = draw(tables)
    css = (Path(__file__).parent / "templates" / "report.css").read_text(encoding="utf-8")
    windows = tables.effects.drop_duplicates(["window", "split"]).groupby("split", sort=False)
    context = {
        "tables": tables,
        "summary": tables.summary,
        "headline": words.headline(tables),
        "warnings": words.warnings(tables),
        "drawings": drawings,
        "cells": tables.cells.to_dict("records"),
        "contrasts": tables.contrasts.to_dict("records"),
        "clashes": words.disagreements(tables.contrasts),
        "provenance": words.redact(tables.summary.get("provenance", {})),
        "preregistration": words.redact(tables.preregistration),
        "sample": [(split, rows["document"].nunique(), len(rows)) for split, rows in windows],
        # The style is ours and holds no input; its hash is what the policy allows.
        "css": Markup(css),
        "css_hash": base64.b64encode(hashlib.sha256(css.encode()).digest()).decode(),
    }
    html = _environment(autoescape=True).get_template("report.html.j2").render(context)
    text = _environment(autoescape=False).get_template("report.md.j2").render(context)
    for drawing in (d for section in drawings.values() for d in section):
        _write(folder, f"figures/{drawing.stem}.svg", drawing.svg)
    _write(folder, "report.md", text)
    return _write(folder, "report.html", html)


def _write(folder: Path, name: str, text: str) -> Path:
    """Writes one file inside `folder` as a whole or not at all."""
    path, part = folder / name, folder / f"{name}.part"
    try:
        path.parent.mkdir(exist_ok=True)
        if not path.resolve().is_relative_to(folder.resolve()):
            raise ConfigError(f"{path} is a link out of the probe folder: remove it and draw the report again")
        part.unlink(missing_ok=True)  # left by a kill, or a link: neither is written through
        with part.open("xb") as file:
            file.write(text.encode("utf-8", errors="replace"))
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise StorageError(f"cannot write {path} ({one_line(error)}): free space or make it writable") from error
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m attnres.probe.report DIR`: draws a report again, prints its path, returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m attnres.probe.report", description="Redraw a probe's report.")
    parser.add_argument("folder", type=Path, help="a folder that probe.py wrote")
    try:
        path = write_report(parser.parse_args(arguments).folder)
    except AttnResError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.code
    sys.stdout.write(f"{path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

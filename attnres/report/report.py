"""The report of a probe: the tables in a folder become report.html, report.md and figures/.

No model is loaded and nothing is recomputed that a table already says: `python -m attnres.commands.report DIR`
draws the report of an old run again, and gives the same bytes. Several folders give one report that compares
their runs (`attnres.report.comparison`). Effects are in nats/token.
"""

from pathlib import Path
from typing import Any

from attnres.report import methods, words
from attnres.report.album import FIGURES, Drawing, draw
from attnres.report.page import render_html, render_text, write_report_files
from attnres.report.tables import Tables, read_tables
from attnres.report.viewer import viewer_data

_SECTIONS = {
    "claims": "Claims",
    "checks": "Checks",
    "routing": "Routing",
    "schedule": "Schedule",
    "effects": "Effects",
    "mass": "Mass and effect",
    "forest": "Intervals",
    "doses": "Doses",
    "contrasts": "Contrasts",
    "motifs": "Motifs",
    "viewer": "Tokens",
    "cells": "All cells",
    "reading": "How to read",
    "methods": "Methods",
    "provenance": "Provenance",
}


def write_report(folder: Path, out: Path | None = None) -> Path:
    """Draws report.html, report.md and figures/*.svg from the tables in `folder`; returns the first's path.

    The same tables give the same bytes.

    Args:
        out: where the report goes; `folder` by default.

    Raises:
        ConfigError: the folder does not exist, or a target leads out of it.
        DataError: a table or a column is missing or unreadable.
        StorageError: the report cannot be written.
    """
    folder = Path(folder)
    out = folder if out is None else Path(out)
    tables = read_tables(folder)
    drawings = draw(FIGURES, tables)
    context = _context(tables, drawings) | {"viewer": viewer_data(folder)}
    kept = {
        "doses": bool(drawings["doses"] or drawings["ladder"]),
        "viewer": context["viewer"],
        "motifs": context["motifs"],
    }
    context["sections"] = [(anchor, name) for anchor, name in _SECTIONS.items() if kept.get(anchor, True)]
    text, html = render_text("report.md.j2", context), render_html("report.html.j2", context)
    write_report_files(out, {"report.md": text, "report.html": html}, drawings)
    return out / "report.html"


def _context(tables: Tables, drawings: dict[str, list[Drawing]]) -> dict[str, Any]:
    windows = tables.effects.drop_duplicates(["window", "split"]).groupby("split", sort=False)
    return {
        "title": tables.summary.get("title") or "AttnRes probe",
        "tables": tables,
        "summary": tables.summary,
        "statistics": tables.summary["statistics"],
        "headline": words.headline(tables),
        "warnings": words.warnings(tables),
        "drawings": drawings,
        "cells": tables.cells.to_dict("records"),
        "bh": tables.discovery_column,
        "contrasts": tables.contrasts.to_dict("records"),
        "motifs": words.motifs(tables),
        "methods": methods.of_probe(tables),
        "clashes": words.disagreements(tables.against_baselines),
        "provenance": tables.summary["provenance"],
        "preregistration": tables.preregistration,
        "sample": [(split, rows["document"].nunique(), len(rows)) for split, rows in windows],
    }

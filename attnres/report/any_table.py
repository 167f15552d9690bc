"""The folder of a table that no probe made: its verdicts, what they came from, and a page with both."""

import hashlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pandas as pd

from attnres import __version__
from attnres.errors import ConfigError
from attnres.files.provenance import git_state, versions
from attnres.files.whole_files import storage_errors, write_json
from attnres.report import methods
from attnres.report.page import render_html, render_text, write_report_files
from attnres.statistics.any_table import unresolved
from attnres.statistics.config import StatisticsConfig
from attnres.tables import columns
from attnres.tables.folder import PREREGISTRATION, SUMMARY, write_table
from attnres.tables.foreign import Foreign
from attnres.tables.names import Verdict

# Of the statistics of a probe, what a table of components takes no part in.
_OF_PROBES = ("grid_cells", "permutations", "looks", "spending", "rank_look")


def write_any_table(
    out: Path, table: Foreign, cells: pd.DataFrame, config: StatisticsConfig, second_margin: float | None
) -> Path:
    """Writes cells.csv, summary.json, report.html and report.md; returns the path of the page.

    The same table and settings give the same bytes.

    Args:
        cells: `component_table` of `table`.

    Raises:
        ConfigError: `out` is the folder of a probe, or a file of it is the table itself.
        StorageError: a file cannot be written.
    """
    if (out / PREREGISTRATION).exists() or (out / columns.COMPONENTS.name).resolve() == table.path.resolve():
        raise ConfigError(f"--out {out}: its files would be overwritten; name a folder of its own")
    statistics = {name: value for name, value in asdict(config).items() if name not in _OF_PROBES}
    if second_margin is not None:
        statistics["second_margin"] = second_margin
    summary = {
        "title": f"What {table.path.name} shows",
        "table": {"name": table.path.name, "sha256": hashlib.sha256(table.path.read_bytes()).hexdigest()},
        "columns": {role: list(names) for role, names in table.names.items()},
        "statistics": statistics,
        "provenance": {"git": git_state(), "versions": {"attnres": __version__} | versions()},
    }
    with storage_errors(out, "free space or name another --out", every=True):
        out.mkdir(parents=True, exist_ok=True)
        write_table(out, columns.COMPONENTS, cells)
        write_json(out / SUMMARY, summary)
    context = {
        "title": summary["title"],
        "summary": summary,
        "cells": cells.to_dict("records"),
        "has": {name: name in cells for name in ("group", "second", "control_p")},
        "headline": list(_headline(cells)),
        "warnings": list(_warnings(cells, config)),
        "methods": methods.of_table(summary, cells),
        "sections": [("cells", "All components"), ("methods", "Methods"), ("provenance", "Provenance")],
        "viewer": None,
    }
    text, html = (
        render(f"any_table.{kind}.j2", context) for render, kind in ((render_text, "md"), (render_html, "html"))
    )
    write_report_files(out, {"report.md": text, "report.html": html}, {})
    return out / "report.html"


def _headline(cells: pd.DataFrame) -> Iterator[str]:
    for group, rows in cells.groupby("group", sort=False) if "group" in cells else [("", cells)]:
        counted = rows["verdict"].value_counts()
        words = (Verdict.CAUSAL, Verdict.NEGLIGIBLE, Verdict.INCONCLUSIVE)
        outcome = ", ".join(f"{counted.get(word, 0)} {word}" for word in words)
        yield f"{group or 'All'}: {len(rows)} components, {outcome}."


def _warnings(cells: pd.DataFrame, config: StatisticsConfig) -> Iterator[str]:
    lost = unresolved(cells, config.alpha)
    if len(lost):
        first = lost.iloc[0]
        yield (
            f"{len(lost)} of {len(cells)} components have too few units for any effect to be found by its sign flips. "
            f"With {first['documents']} units p is at least {first['smallest_p']:.2g}, and Holm multiplies the "
            f"smallest of a family by {first['family_size']}."
        )

"""One report over several probes: seeds side by side, steps of one training as a path, a run against its controls.

The first run is the one that the others are compared with. Effects are in nats/token; seeds get no p-value of their
own under six.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from attnres.errors import AttnResError, StorageError
from attnres.report import words as words
from attnres.report.album import Album, Drawing
from attnres.report.figures import doses as figures_doses
from attnres.report.figures import forest as figures_forest
from attnres.report.page import render_html, render_text, write_file
from attnres.report.runs import (
    Run,
    cautions,
    differences,
    read_effects,
    read_runs,
    seed_groups,
    trainings,
)
from attnres.report.tables import one_line
from attnres.statistics.config import StatisticsConfig
from attnres.statistics.contrasts import contrast_table
from attnres.statistics.design import Design
from attnres.statistics.inference import sign_flip_p

SECTIONS = ("side", "seeds", "steps", "paired")
LEAST_SEEDS = 6
_CELL = ["cell", "family", "sublayer", "band"]


def default_folder(folders: Sequence[Path]) -> Path:
    """`comparison-*` beside the first folder, named by the folders that it compares."""
    names = "\n".join(str(Path(f).resolve().name) for f in folders)
    return Path(folders[0]).resolve().parent / f"comparison-{hashlib.sha256(names.encode()).hexdigest()[:8]}"


def write_comparison(folders: Sequence[Path], out: Path) -> Path:
    """Draws report.html, report.md, contrasts.csv and figures/ over several probes; returns the first's path.

    Args:
        folders: what probes wrote, the run to compare with first.
        out: where the report goes; made if it is missing.

    Raises:
        ConfigError: a folder does not exist or is named twice.
        DataError: a table is missing or unreadable.
        StorageError: the report cannot be written.
    """
    runs = read_runs(folders)
    contrasts, why_not = paired_contrasts(runs)
    drawings = _draw(runs, contrasts)
    varied, same = differences(runs)
    names = {"claims": "Claims", "runs": "Runs", "differ": "Differences", "side": "Effects", "seeds": "Seeds",
             "steps": "Training", "paired": "Paired", "cells": "All cells", "provenance": "Folders"}  # fmt: skip
    seeds = [(group, seed_table(group).to_dict("records")) for group in seed_groups(runs)]
    kept = {name: bool(drawings[name]) for name in ("side", "seeds", "steps")}
    kept["paired"] = bool(drawings["paired"] or why_not)
    context = {
        "title": f"{len(runs)} probes compared",
        "viewer": None,
        "runs": runs,
        "warnings": cautions(runs),
        "claims": _claims(runs),
        "baselines": _against_baselines(runs),
        "varied": varied,
        "same": same,
        "drawings": drawings,
        "seeds": seeds,
        "least_seeds": LEAST_SEEDS,
        "contrasts": contrasts.to_dict("records"),
        "why_not": why_not,
        "cells": _cells(runs),
        "sections": [(anchor, name) for anchor, name in names.items() if kept.get(anchor, True)],
    }
    html, text = render_html("compare.html.j2", context), render_text("compare.md.j2", context)
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot make {out} ({one_line(error)}): name another folder with --out") from error
    for drawing in (d for section in drawings.values() for d in section):
        write_file(out, f"figures/{drawing.stem}.svg", drawing.svg)
    write_file(out, "contrasts.csv", contrasts.to_csv(index=False))
    write_file(out, "report.md", text)
    return write_file(out, "report.html", html)


def paired_contrasts(runs: Sequence[Run]) -> tuple[pd.DataFrame, str]:
    """The first run's effect less each other's, paired by window, averaged and tested by document; or why not.

    The tests are those of `contrasts.csv`, with the other runs in the place of baselines and the first run's settings.
    """
    empty = pd.DataFrame(columns=["baseline", *_CELL, "diff", "diff_lo", "diff_hi", "p_holm", "verdict"])
    if len({run.windows for run in runs}) > 1:
        return empty, "The runs were not probed on the same windows, so their effects cannot be paired."
    if len({run.tables.trained for run in runs} | {run.tables.intervention for run in runs}) > 2:
        return empty, "The runs do not share the probed model's name and intervention."
    eligibility = pd.concat([run.cells.assign(model=run.label) for run in runs], ignore_index=True)
    effects = pd.concat([read_effects(run) for run in runs], ignore_index=True)
    known = {field.name for field in dataclasses.fields(StatisticsConfig)}
    given = {k: v for k, v in runs[0].tables.summary["statistics"].items() if k in known}
    try:
        design = Design.of(effects, pd.DataFrame(), eligibility, ["dnll"])
        return contrast_table(design, StatisticsConfig(**given), runs[0].label), ""
    except (AttnResError, ValueError, TypeError) as error:
        return empty, f"The runs cannot be paired: {one_line(error)}"


def seed_table(group: Sequence[Run]) -> pd.DataFrame:
    """Per cell that is eligible in all runs: each seed's effect, their mean, least and most, and from `LEAST_SEEDS`
    seeds on the sign-flip p over seeds (uncorrected).
    """
    cells = pd.concat([run.cells[run.cells["eligible"]] for run in group])
    wide = cells.pivot_table(index=_CELL, columns="run", values="dnll", sort=False).reindex(
        columns=[run.label for run in group]
    )
    wide = wide.dropna()
    values = wide.to_numpy(float)
    table = wide.index.to_frame(index=False)
    table["values"] = values.tolist()
    table["mean"], table["least"], table["most"] = values.mean(1), values.min(1), values.max(1)
    enough = len(group) >= LEAST_SEEDS and len(values) > 0
    table["p"] = sign_flip_p(values.T, 9999, 0) if enough else np.nan
    return table


def _draw(runs: Sequence[Run], contrasts: pd.DataFrame) -> dict[str, list[Drawing]]:
    album, margin = Album(SECTIONS), runs[0].tables.margin
    labels = [run.label for run in runs]
    everything = pd.concat([run.cells for run in runs], ignore_index=True)
    seeds = seed_groups(runs)
    if not any(len(group) == len(runs) for group in seeds):  # the same figure
        alt = f"Effects with 95% intervals of {len(runs)} runs in every cell, against ±{margin:g} nats/token."
        album.add("side", "", figures_forest.effect_forest(everything, labels, margin, by="run"), alt)
    for index, group in enumerate(seeds):
        part = pd.concat([run.cells for run in group], ignore_index=True)
        names = [run.label for run in group]
        alt = f"{group[0].experiment}: effects of {len(group)} seeds side by side in every cell."
        album.add("seeds", str(index), figures_forest.effect_forest(part, names, margin, by="run"), alt)
    for index, group in enumerate(trainings(runs)):
        part = pd.concat([run.cells for run in group], ignore_index=True)
        steps = ", ".join(f"{run.step:g}" for run in group)
        alt = f"{group[0].run}: effects of every cell at training steps {steps}."
        album.add("steps", str(index), figures_doses.trajectory(part, group[0].run, margin), alt)
    if len(contrasts):
        subtracted = f"{words.visible(labels[0])[:40]} − other"
        figure = figures_forest.contrast_forest(contrasts, labels, margin, subtracted)
        album.add("paired", "", figure, f"Effect of {labels[0]} less that of each other run in every shared cell.")
    return album.drawings


def _claims(runs: Sequence[Run]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Every claim of any run, with each run's row for it (empty where it has none)."""
    told = [{str(c.get("claim")): c for c in run.tables.summary["claims"]} for run in runs]
    return [
        (claim, [rows.get(claim, {}) for rows in told]) for claim in dict.fromkeys(c for rows in told for c in rows)
    ]


def _against_baselines(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """How the contrasts of each run with each of its baselines came out."""
    rows = []
    for run in runs:
        for baseline, part in run.tables.primary_contrasts.groupby("baseline", sort=False):
            rows.append({"run": run.label, "baseline": baseline, "counts": part["verdict"].value_counts().to_dict()})
    return rows


def _cells(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A row per cell of any run: its record in each, None where a run has it not."""
    found = [{r["cell"]: r for r in run.cells.to_dict("records")} for run in runs]
    return [{"cell": c, "records": [t.get(c) for t in found]} for c in dict.fromkeys(c for t in found for c in t)]

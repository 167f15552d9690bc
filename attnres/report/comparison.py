"""One report over several probes: seeds side by side, steps of one training as a path, a run against its controls.

The first run is the one that the others are compared with. Effects are in nats/token; seeds get no p-value of their
own under six.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from attnres.errors import AttnResError, one_line
from attnres.report import words
from attnres.report.album import FigureEntry, Plate, draw
from attnres.report.figures import doses, forest
from attnres.report.page import render_html, render_text, write_report_files
from attnres.report.runs import Run, cautions, differences, read_effects, read_runs, seed_groups, trainings
from attnres.statistics.config import StatisticsConfig
from attnres.statistics.contrasts import contrast_table
from attnres.statistics.design import Design
from attnres.statistics.inference import sign_flip_p
from attnres.tables import columns

LEAST_SEEDS = 6
_CELL = ["cell", *columns.SLICE]


@dataclass(frozen=True)
class Compared:
    """Several probes: the runs, the first of them first, and how it differs from each other one."""

    runs: Sequence[Run]
    contrasts: pd.DataFrame


def default_folder(folders: Sequence[Path]) -> Path:
    """`comparison-*` beside the first folder, named by the folders that it compares."""
    names = "\n".join(str(Path(f).resolve().name) for f in folders)
    return Path(folders[0]).resolve().parent / f"comparison-{hashlib.sha256(names.encode()).hexdigest()[:8]}"


def write_comparison(folders: Sequence[Path], out: Path) -> Path:
    """Draws report.html, report.md, contrasts.csv and figures/ over several probes; returns the first's path.

    Args:
        folders: what probes wrote, the run to compare with first.

    Raises:
        ConfigError: a folder does not exist or is named twice.
        DataError: a table is missing or unreadable.
        StorageError: the report cannot be written.
    """
    runs = read_runs(folders)
    contrasts, why_not = paired_contrasts(runs)
    drawings = draw(FIGURES, Compared(runs, contrasts))
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
    files = {
        "contrasts.csv": contrasts.to_csv(index=False),
        "report.md": render_text("compare.md.j2", context),
        "report.html": render_html("compare.html.j2", context),
    }
    write_report_files(out, files, drawings)
    return out / "report.html"


def paired_contrasts(runs: Sequence[Run]) -> tuple[pd.DataFrame, str]:
    """The first run's effect less each other's, paired by window, averaged and tested by document; or why not.

    The tests are those of `contrasts.csv`, as the first run's were, with the other runs in the place of baselines.
    """
    empty = pd.DataFrame(columns=["baseline", *_CELL, "diff", "diff_lo", "diff_hi", "p_holm", "verdict"])
    if len({run.windows for run in runs}) > 1:
        return empty, "The runs were not probed on the same windows, so their effects cannot be paired."
    if len({run.tables.trained for run in runs} | {run.tables.intervention for run in runs}) > 2:
        return empty, "The runs do not share the probed model's name and intervention."
    eligibility = pd.concat([run.cells.assign(model=run.label) for run in runs], ignore_index=True)
    effects = pd.concat([read_effects(run) for run in runs], ignore_index=True)
    known = {field.name for field in fields(StatisticsConfig)}
    given = {k: v for k, v in runs[0].tables.summary["statistics"].items() if k in known}
    try:
        config = StatisticsConfig(**given)
        design = Design.of(effects, pd.DataFrame(), eligibility, ["dnll"], config)
        return contrast_table(design, config, runs[0].label), ""
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


def _side(compared: Compared) -> Iterator[Plate]:
    runs, margin = compared.runs, compared.runs[0].tables.margin
    if not any(len(group) == len(runs) for group in seed_groups(runs)):  # that would be the same figure
        alt = f"Effects with 95% intervals of {len(runs)} runs in every cell, against ±{margin:g} nats/token."
        yield Plate("", alt, _side_by_side(runs, margin))


def _seeds(compared: Compared) -> Iterator[Plate]:
    for index, group in enumerate(seed_groups(compared.runs)):
        alt = f"{group[0].experiment}: effects of {len(group)} seeds side by side in every cell."
        yield Plate(str(index), alt, _side_by_side(group, compared.runs[0].tables.margin))


def _side_by_side(runs: Sequence[Run], margin: float) -> dict[str, Any]:
    cells = pd.concat([run.cells for run in runs], ignore_index=True)
    return {"cells": cells, "models": [run.label for run in runs], "margin": margin, "by": "run"}


def _steps(compared: Compared) -> Iterator[Plate]:
    for index, group in enumerate(trainings(compared.runs)):
        cells = pd.concat([run.cells for run in group], ignore_index=True)
        steps = ", ".join(f"{run.step:g}" for run in group)
        alt = f"{group[0].run}: effects of every cell at training steps {steps}."
        margin = compared.runs[0].tables.margin
        yield Plate(str(index), alt, {"cells": cells, "title": group[0].run, "margin": margin})


def _paired(compared: Compared) -> Iterator[Plate]:
    labels = [run.label for run in compared.runs]
    if len(compared.contrasts):
        alt = f"Effect of {labels[0]} less that of each other run in every shared cell."
        arguments = {"contrasts": compared.contrasts, "models": labels, "margin": compared.runs[0].tables.margin}
        yield Plate("", alt, arguments | {"names": f"{words.visible(labels[0])[:40]} − other"})


# As `attnres.report.album.FIGURES`, of several probes.
FIGURES: tuple[FigureEntry[Compared], ...] = (
    FigureEntry("side", forest.effect_forest, _side),
    FigureEntry("seeds", forest.effect_forest, _seeds),
    FigureEntry("steps", doses.trajectory, _steps),
    FigureEntry("paired", forest.contrast_forest, _paired),
)


def _claims(runs: Sequence[Run]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Every claim of any run, with each run's row for it (empty where it has none)."""
    by_run = [{str(row.get("claim")): row for row in run.tables.summary["claims"]} for run in runs]
    claims = dict.fromkeys(claim for rows in by_run for claim in rows)
    return [(claim, [rows.get(claim, {}) for rows in by_run]) for claim in claims]


def _against_baselines(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """How the contrasts of each run with each of its baselines came out."""
    rows = []
    for run in runs:
        for baseline, contrasts in run.tables.primary_contrasts.groupby("baseline", sort=False):
            counts = contrasts["verdict"].value_counts().to_dict()
            rows.append({"run": run.label, "baseline": baseline, "counts": counts})
    return rows


def _cells(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A row per cell of any run: its record in each, None where a run has it not."""
    by_run = [{row["cell"]: row for row in run.cells.to_dict("records")} for run in runs]
    cells = dict.fromkeys(cell for rows in by_run for cell in rows)
    return [{"cell": cell, "records": [rows.get(cell) for rows in by_run]} for cell in cells]

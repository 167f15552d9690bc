"""`probe.py`: probe a checkpoint against its baseline; prints the verdicts and the path of the report.

`probe` is the walk, in seven steps: locate -> subjects -> check -> register -> measure -> judge -> report. Each gives a
frozen value that the next ones take.
"""

import dataclasses
import logging
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from attnres import faults
from attnres.commands.hydra_door import Plain, configured_command
from attnres.config import build, to_plain
from attnres.files.provenance import command_line
from attnres.files.run_folder import refuse_unsafe_loading

if TYPE_CHECKING:
    from collections.abc import Collection

    import pandas as pd

    from attnres.interventions.grid import Grid
    from attnres.probe.config import ProbeConfig
    from attnres.probe.preregistration import Fixed
    from attnres.probe.runner import Measured, Needed, WhatNext
    from attnres.statistics.config import StatisticsConfig
    from attnres.statistics.judgement import Judged

log = logging.getLogger(__name__)

_SMALLER = "lower probe.batch_size (the result stays the same)"


@dataclass(frozen=True)
class Result:
    """Where a probe wrote, and its table of cells."""

    folder: Path
    report: Path
    cells: "pd.DataFrame"


def main() -> None:
    configured_command("probe", _probe)


def _probe(plain: Plain) -> None:
    from attnres.probe.config import ProbeConfig

    result = probe(build(ProbeConfig, plain), command_line())
    if result is not None:
        print(verdict_table(result.cells))
        print(result.report)


def probe(config: "ProbeConfig", command: str) -> Result | None:
    """Run a probe and write its folder.

    Returns:
        What it wrote; None in all but the first of several processes.

    Raises:
        ConfigError: no baseline, a configuration that does not fit the models, or a folder in use.
        DataError: no windows.
        CheckpointError: a checkpoint that is missing or unreadable.
        NumericsError: a check that fails, or an effect that is not finite.
        StorageError: a folder that cannot be written.
        Stopped: a signal came; what is finished is kept, and the same command resumes.
    """
    # Here and not above: a configuration that is wrong is refused before torch is loaded.
    import torch

    from attnres.interventions.grid import make_grid
    from attnres.probe.checks import check_subjects
    from attnres.probe.execution import executing, only_probe_in
    from attnres.probe.pieces import PIECES
    from attnres.probe.preregistration import Fixed, register
    from attnres.probe.runner import measure
    from attnres.probe.subjects import load_subjects, locate_checkpoints, probe_folder
    from attnres.probe.summary import write_measured
    from attnres.processes.memory import out_of_memory
    from attnres.processes.ranks import launched
    from attnres.report.report import write_report
    from attnres.statistics.looks import resolved
    from attnres.tables.names import Model, Split

    refuse_unsafe_loading()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    with launched(config.devices, config.device) as ranks:
        checkpoints = locate_checkpoints(config)
        faults.point("probe.located")
        subjects = load_subjects(config, checkpoints, ranks)
        folder, grid = probe_folder(config, checkpoints), make_grid(config.probe, subjects.plans)
        with only_probe_in(folder, ranks), out_of_memory(_SMALLER):
            checks = check_subjects(subjects, grid)
            faults.point("probe.checked")
            if ranks.rank == 0:
                log.info("%d checks passed; writing to %s", len(checks), folder)
            cells = config.statistics.grid_cells or grid.whole
            documents = subjects.text.counts["documents"][Split.CONFIRM]
            looks = resolved(config.statistics.looks, documents)
            statistics = dataclasses.replace(config.statistics, grid_cells=cells, looks=looks)
            fixed = Fixed(config.probe, to_plain(statistics), subjects, grid, checks, command)
            ranks.first(partial(register, folder, fixed))
            faults.point("probe.registered")
            with executing(folder, fixed, ranks) as execution:
                estimated = (Model.TRAINED,) if config.probe.attribution else ()
                measured = measure(subjects.models, grid, execution, _what_next(fixed, statistics), estimated)
            if ranks.rank > 0:
                return None
            faults.point("probe.tables")
            write_measured(folder, fixed, measured)
            judged = _judge(folder, fixed, measured, statistics)
            report = write_report(folder)
            shutil.rmtree(folder / PIECES)
            return Result(folder, report, judged.cells)
    return None


def _what_next(fixed: "Fixed", statistics: "StatisticsConfig") -> "WhatNext":
    """Which cells each look measures: what an open question needs, or all where a part of the grid cannot know."""
    import pandas as pd

    from attnres.probe.runner import everything
    from attnres.statistics.open_questions import needed_at
    from attnres.tables.names import Split

    if not fixed.looks or len(fixed.grid.specs) < fixed.grid.whole:
        return everything
    models = [
        {"name": subject.name, "convention": subject.plan.convention, "routing_trained": subject.routing_trained}
        for subject in fixed.subjects.models
    ]

    def what_next(grid: "Grid", splits: "Collection[str]", measured: "Measured | None") -> "Needed":
        (split,) = splits
        effects, mass = (None, None) if measured is None else (measured.effects, measured.mass)
        listed = pd.DataFrame([candidate.row for candidate in grid.candidates])
        return needed_at(Split(split), effects, mass, listed, models, statistics)

    return what_next


def _judge(folder: Path, fixed: "Fixed", measured: "Measured", statistics: "StatisticsConfig") -> "Judged":
    """The tables of verdicts, and `summary.json` with the claims."""
    from attnres.files.whole_files import write_json
    from attnres.probe.summary import summarise
    from attnres.statistics.judgement import findings, judge
    from attnres.tables.folder import SUMMARY

    summary = summarise(folder, fixed, measured)
    models = summary["models"]
    judged = judge(measured.effects, measured.mass, measured.eligibility, statistics, models)
    judged.write(folder)
    claims = findings(judged, summary["checks"], statistics, models, measured.attribution)
    write_json(folder / SUMMARY, summary | claims)
    return judged


def verdict_table(cells: "pd.DataFrame") -> str:
    """Verdicts for a terminal: a line per cell, a column per model."""
    from attnres.tables.names import Verdict

    verdicts = [
        row.verdict if row.verdict == Verdict.EXCLUDED else f"{row.verdict} {row.dnll:+.4f}"
        for row in cells.itertuples()
    ]
    wide = cells.assign(shown=verdicts).pivot(index="cell", columns="model", values="shown")
    order, models = cells["cell"].drop_duplicates(), cells["model"].drop_duplicates()
    return wide.loc[list(order), list(models)].fillna("-").rename_axis(columns=None).to_string()

"""The runner on one model, in memory."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from attnres.data import ProbeWindows
from attnres.interventions.grid import Grid
from attnres.interventions.ids import Spec
from attnres.probe.execution import Execution
from attnres.probe.runner import Measured, measure
from attnres.probe.subjects import Subject


def measure_cells(
    subject: Subject,
    specs: Sequence[Spec],
    windows: Mapping[str, ProbeWindows],
    batch_size: int,
    excluding: bool = True,
    **how: Any,
) -> Measured:
    """`excluding=False` measures what the depth plan would exclude as well; `how`: further fields of the execution."""
    grid = Grid.of(specs, {subject.name: subject.plan})
    if not excluding:
        grid = Grid(tuple(replace(one, cell=replace(one.cell, reason="")) for one in grid.candidates), grid.whole)
    return measure([subject], grid, Execution(windows, batch_size, **how))

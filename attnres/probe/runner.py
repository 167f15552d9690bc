"""The one loop: every cell of the grid, on every window, from the clean state at its first edited layer.

Pilot documents come first: what they say of a model excludes some of its cells. Then documents are measured in stages,
and after each stage a function says which cells are still needed. A batch of windows is the unit of work: its clean
run, then its cells. What is finished is kept in `attnres.probe.pieces`, and the tables are made of these pieces: they
are the same whether a run was interrupted or shared.
"""

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from attnres import faults
from attnres.depth.families import FAMILIES, Cell
from attnres.depth.families import grid as standard_grid
from attnres.depth.plan import DepthPlan
from attnres.errors import NumericsError
from attnres.interventions.donors import Pilot, donors, noise, reads_of, unavailable
from attnres.interventions.edits import Inputs
from attnres.interventions.grid import Grid
from attnres.interventions.ids import DONOR_KINDS, Spec
from attnres.model.state import Trace
from attnres.probe.attribution import attribution_table, run_attribution
from attnres.probe.execution import Batch, Execution, damaged
from attnres.probe.measure import Effects, MassObserver, RoutingSums, routing_means, routing_table
from attnres.probe.passes import CleanRun, first_layer, run_clean, run_edited, run_rows, run_through
from attnres.probe.subjects import Subject
from attnres.tables import columns
from attnres.tables.names import MATCHED, RESCUE, Split

# The pieces that come from a clean run.
OBSERVED = ("mass", "routing", "clean")
# Finished cells are written together if they come faster than this.
_SECONDS_BETWEEN_PIECES = 1.0
# Where cells share a pass: most tokens of it, and most bytes of its logits.
_MOST_TOKENS, _MOST_LOGITS = 2**15, 2**31


@dataclass(frozen=True)
class Measured:
    """What was measured, as tidy tables.

    Attributes:
        grid: as the pilot split left it.
        effects, mass, routing: as the statistics and the report take them.
        clean: negative log-likelihood of the clean runs, by model and confirmatory window.
        attribution: estimates from gradients; empty where none were asked for.
    """

    grid: Grid
    effects: pd.DataFrame
    mass: pd.DataFrame
    routing: pd.DataFrame
    clean: pd.DataFrame
    attribution: pd.DataFrame = field(default_factory=pd.DataFrame)

    @property
    def eligibility(self) -> pd.DataFrame:
        """One row per candidate cell of every model: eligible or why not."""
        return pd.DataFrame([candidate.row for candidate in self.grid.candidates], columns=columns.ELIGIBILITY.names)


# Model -> ids of the cells that a stage measures. A model that is not named is not run; one without cells is run clean.
Needed = Mapping[str, Collection[str]]
# Asked before a stage, in every process, with the grid as the pilot left it, the splits of the stage, and what was
# measured before (None before the first): the answer must depend on these alone.
WhatNext = Callable[[Grid, Collection[str], Measured | None], Needed]


def everything(grid: Grid, splits: Collection[str], measured: Measured | None) -> Needed:
    """Every cell that can be judged, in every stage."""
    return {model: [spec.id for spec in grid.eligible(model)] for model in grid.models}


def measure(
    subjects: Sequence[Subject],
    grid: Grid,
    execution: Execution,
    what_next: WhatNext = everything,
    estimated: Collection[str] = (),
) -> Measured:
    """Effects of every eligible cell on every window, with mass and routing from the clean runs.

    Args:
        grid: the cells; what needs the pilot split and cannot have it is excluded.
        execution: how, and in which stages.
        what_next: says before each stage which cells it measures.
        estimated: models whose masks are estimated from gradients as well.

    Raises:
        NumericsError: an effect is not finite; names the cell.
        StorageError: a piece was damaged after it was written.
        Stopped: a signal came; what is finished is kept.
    """
    works = {}
    for subject in subjects:
        execution.progress.set_postfix_str(subject.name)
        execution.together(partial(_run_pilot, subject, grid.eligible(subject.name), execution))
        pilot, pilot_windows = _pilot_of(subject, execution), execution.windows.get(Split.PILOT)
        eligible = grid.eligible(subject.name)
        reasons = {spec.id: unavailable(spec, subject.plan, pilot, pilot_windows) for spec in eligible}
        grid = grid.excluding(subject.name, reasons)
        works[subject.name] = _Work(subject, tuple(grid.eligible(subject.name)), pilot)
    done: list[_Done] = []
    measured: Measured | None = None
    execution.progress.reset(0)
    for stage in execution.batches:
        needed = what_next(grid, {batch.split for batch in stage}, measured)
        if not needed:
            continue
        cells = {name: [spec for spec in works[name].specs if spec.id in ids] for name, ids in needed.items()}
        execution.progress.total += len(execution.mine(stage)) * sum(map(len, cells.values()))
        for name, specs in cells.items():
            execution.progress.set_postfix_str(name)
            execution.together(partial(_run_cells, works[name], specs, stage, execution))
            done += [_Done(name, batch, specs) for batch in stage]
        measured = _tables(subjects, grid, done, execution)
    assert measured is not None
    estimates = [_estimates(subject, grid, done, execution) for subject in subjects if subject.name in estimated]
    return replace(measured, attribution=pd.concat(estimates, ignore_index=True)) if estimates else measured


@dataclass(frozen=True)
class _Work:
    """A model, its eligible cells, and what the pilot split says of it."""

    subject: Subject
    specs: tuple[Spec, ...]
    pilot: Pilot | None


class _Done(NamedTuple):
    """Cells of a model that were measured on a batch."""

    model: str
    batch: Batch
    specs: Sequence[Spec]


@torch.no_grad()
def _run_pilot(subject: Subject, specs: Sequence[Spec], execution: Execution) -> None:
    """Clean runs of the pilot split, kept as pieces; `_pilot_of` reads them."""
    for batch in execution.mine(_pilot_batches(execution)):
        if not _observed(subject, execution, batch):
            execution.end_if_stopping()
            _clean_run(subject, specs, [], batch, execution)


def _pilot_batches(execution: Execution) -> tuple[Batch, ...]:
    return tuple(batch for stage in execution.batches for batch in stage if batch.split == Split.PILOT)


def _pilot_of(subject: Subject, execution: Execution) -> Pilot | None:
    """What the pilot split says about a model; None where there is no such split."""
    if not (batches := _pilot_batches(execution)):
        return None
    observed = _observations(subject, batches, execution)
    return Pilot.of(observed["mass"], routing_means(observed["routing"]))


@torch.no_grad()
def _run_cells(work: _Work, specs: Sequence[Spec], batches: tuple[Batch, ...], execution: Execution) -> None:
    """Effects of cells on this process's share of some batches, from what is not yet kept as pieces."""
    subject, pieces = work.subject, execution.pieces
    for batch in execution.mine(batches):
        key = batch.key(subject.name, "effects")
        finished = pieces.cells(key)
        todo = [spec for spec in specs if spec.id not in finished]
        execution.progress.update(len(specs) - len(todo))
        if not todo and _observed(subject, execution, batch):
            continue
        execution.end_if_stopping()
        starts = sorted({first_layer(spec, subject.plan) for spec in todo})
        clean = _clean_run(subject, work.specs, starts, batch, execution, reads_of(todo, subject.plan, [RESCUE]))
        inputs = _inputs(work, todo, batch, execution, clean)
        rows: list[pd.DataFrame] = []
        written = time.monotonic()
        for group in _passes(subject, specs, execution, clean):
            if finished.issuperset(spec.id for spec in group):
                continue
            for spec, effects in zip(group, _effects(subject, clean, group, inputs), strict=True):
                values = {name: value.cpu().numpy() for name, value in effects._asdict().items()}
                if not all(np.isfinite(value).all() for value in values.values()):
                    raise NumericsError(
                        f"{subject.name}: {spec.id} gives a value that is not finite; check the checkpoint"
                    )
                rows.append(pd.DataFrame(batch.identity | {"cell": spec.id} | values))
            faults.point("probe.cell")
            execution.progress.update(len(group))
            if execution.stopping() or time.monotonic() - written > _SECONDS_BETWEEN_PIECES:
                pieces.put(key, pd.concat(rows, ignore_index=True))
                rows, written = [], time.monotonic()
                execution.end_if_stopping()
        if rows:
            pieces.put(key, pd.concat(rows, ignore_index=True))


def _clean_run(
    subject: Subject,
    specs: Sequence[Spec],
    starts: Sequence[int],
    batch: Batch,
    execution: Execution,
    sources_at: Collection[int] = (),
) -> CleanRun:
    """The clean run of a batch; what it says about mass and routing is kept if it is not yet.

    Args:
        specs: the cells whose families' mass is measured, beside those of the standard grid.
        starts: layers in front of which the state is kept.
        sources_at: reads whose source vectors are kept.
    """
    ids, labels = batch.tokens(subject.model.lm_head.weight.device)
    if _observed(subject, execution, batch):
        return run_clean(subject.model, ids, labels, starts, sources_at=sources_at)
    mass, routing = MassObserver(subject.plan, slices(subject.plan, specs)), RoutingSums()

    def observe(trace: Trace) -> None:
        mass(trace)
        routing(trace)

    clean = run_clean(subject.model, ids, labels, starts, observe, sources_at)
    identity = {"model": subject.name, **batch.identity, "split": batch.split}
    nll = pd.DataFrame(identity | {"nll": clean.readout.nll.mean(-1).cpu().numpy()})
    observed = {"mass": mass.table(identity), "routing": routing.table(batch.split), "clean": nll}
    for kind in OBSERVED:
        execution.pieces.put(batch.key(subject.name, kind), observed[kind])
    return clean


def slices(plan: DepthPlan, specs: Sequence[Spec]) -> tuple[Cell, ...]:
    """The cells whose mass is measured: the standard grid's, and those of the interventions."""
    wanted = [*standard_grid(plan), *(member.cell(plan) for spec in specs for member in spec.members)]
    return tuple(dict.fromkeys(cell for cell in wanted if cell.eligible and cell.family in FAMILIES))


def _observed(subject: Subject, execution: Execution, batch: Batch) -> bool:
    """Whether everything that the clean run of a batch says is kept."""
    return all(execution.pieces.has(batch.key(subject.name, kind)) for kind in OBSERVED)


def _inputs(work: _Work, specs: Sequence[Spec], batch: Batch, execution: Execution, clean: CleanRun) -> Inputs:
    """What these interventions borrow for a batch: one clean run of its donors, if any of them needs one."""
    subject, plan, windows = work.subject, work.subject.plan, batch.windows
    device = subject.model.lm_head.weight.device
    weights: dict[int, Tensor] = {}
    sources: dict[int, tuple[Tensor, ...]] = {}
    if borrowed := reads_of(specs, plan, DONOR_KINDS):
        pilot_windows = execution.windows[Split.PILOT]
        chosen = donors(windows, batch.split, pilot_windows, execution.seed)

        def keep(trace: Trace) -> None:
            if trace.site.read in borrowed:
                weights[trace.site.read], sources[trace.site.read] = trace.log_weights, trace.sources

        run_through(subject.model, pilot_windows.input_ids[chosen].to(device), [], keep)
    length, ids = windows.input_ids.shape[1], windows.window_ids.tolist()
    drawn = {
        read: noise(ids, batch.split, read, length, plan.reads[read].num_sources, execution.seed).to(device)
        for read in reads_of(specs, plan, [MATCHED])
    }
    return Inputs({} if work.pilot is None else work.pilot.mean, weights, sources, clean.sources, drawn)


def _passes(subject: Subject, specs: Sequence[Spec], execution: Execution, clean: CleanRun) -> Iterator[Sequence[Spec]]:
    """Interventions that share a forward pass: those that start at the same layer, a few at a time."""
    size = execution.cells_per_pass
    if size is None:
        tokens = min(_MOST_TOKENS, _MOST_LOGITS // (4 * clean.logits.shape[-1])) // clean.readout.labels.numel()
        size = max(1, tokens - 1) if clean.logits.is_cuda else 1
    by_layer: dict[int, list[Spec]] = {}
    for spec in specs:
        by_layer.setdefault(first_layer(spec, subject.plan), []).append(spec)
    for group in by_layer.values() if size > 1 else [list(specs)]:
        for begin in range(0, len(group), size):
            yield group[begin : begin + size]


def _effects(subject: Subject, clean: CleanRun, group: Sequence[Spec], inputs: Inputs) -> list[Effects]:
    if len(group) == 1:
        return [clean.readout.compare(run_edited(subject.model, clean, group[0], inputs))]
    return run_rows(subject.model, clean, group, inputs)


def _tables(subjects: Sequence[Subject], grid: Grid, done: Sequence[_Done], execution: Execution) -> Measured:
    """The tables of what was measured so far, from its pieces.

    Raises:
        StorageError: a piece is missing, because it was damaged after it was written.
    """
    tables: dict[str, list[pd.DataFrame]] = {"effects": [], "mass": [], "routing": [], "clean": []}
    for subject in subjects:
        mine = [entry for entry in done if entry.model == subject.name]
        # The clean runs of the pilot split are always all there: they say what a model's families hold.
        clean = [*_pilot_batches(execution), *(entry.batch for entry in mine if entry.batch.split != Split.PILOT)]
        observed = _observations(subject, clean, execution)
        confirm = {name: rows[rows["split"] == Split.CONFIRM] for name, rows in observed.items()}
        tables["effects"].append(_effects_table(subject, grid, mine, execution))
        tables["mass"].append(observed["mass"])
        tables["routing"].append(routing_table(subject, routing_means(confirm["routing"])))
        tables["clean"].append(confirm["clean"])
    joined = {name: pd.concat(rows, ignore_index=True) for name, rows in tables.items()}
    if "look" in joined["effects"]:
        joined["effects"]["look"] = joined["effects"]["look"].astype("int64")  # also beside a model without effects
    return Measured(grid, **joined)


def _effects_table(subject: Subject, grid: Grid, done: Sequence[_Done], execution: Execution) -> pd.DataFrame:
    tables = []
    for _, batch, specs in done:
        rows = execution.pieces.read(batch.key(subject.name, "effects"))
        order = {spec.id: place for place, spec in enumerate(specs)}
        if set(rows["cell"] if len(rows) else ()) != set(order):
            raise damaged(subject.name, batch)
        if len(rows):
            rows = rows.sort_values("cell", key=lambda column, order=order: column.map(order), kind="stable")
            tables.append(rows.assign(model=subject.name, split=batch.split, **_look_of(batch)))
    effects = pd.concat(tables, ignore_index=True) if tables else _no_effects()
    cells = {candidate.spec.id: candidate.row for candidate in grid.of_model(subject.name)}
    for column in ("intervention", *columns.SLICE):
        effects[column] = effects["cell"].map({cell: row[column] for cell, row in cells.items()})
    return effects[[name for name in columns.EFFECTS.names if name in effects]]


def _look_of(batch: Batch) -> dict[str, int]:
    """The column `look`, where documents came in looks."""
    return {"look": batch.look} if batch.look else {}


def _no_effects() -> pd.DataFrame:
    types = {"text": "object", "integer": "int64", "number": "float32"}
    required = (column for column in columns.EFFECTS.columns if not column.optional)
    return pd.DataFrame({column.name: pd.Series(dtype=types[column.type]) for column in required})


def _estimates(subject: Subject, grid: Grid, done: Sequence[_Done], execution: Execution) -> pd.DataFrame:
    """Estimates from gradients for the masks of a model; empty where it has none."""
    masks = {candidate.spec.id: candidate.cell for candidate in grid.of_model(subject.name) if candidate.is_mask}
    if not masks:
        return pd.DataFrame()
    batches = [batch for model, batch, _ in done if model == subject.name]
    execution.together(partial(run_attribution, subject, masks, batches, execution))
    return attribution_table(subject, batches, execution)


def _observations(subject: Subject, batches: Sequence[Batch], execution: Execution) -> dict[str, pd.DataFrame]:
    """The pieces of the clean runs of some batches, in their order."""
    tables: dict[str, list[pd.DataFrame]] = {kind: [] for kind in OBSERVED}
    for batch in batches:
        for kind in OBSERVED:
            key = batch.key(subject.name, kind)
            if not execution.pieces.has(key):
                raise damaged(subject.name, batch)
            piece = execution.pieces.last(key)
            tables[kind].append(piece.assign(**_look_of(batch)) if kind == "mass" else piece)
    return {kind: pd.concat(rows, ignore_index=True) for kind, rows in tables.items()}

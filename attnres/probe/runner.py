"""The one loop: every cell of the grid, on every window, from the clean state at its first edited layer.

A batch of windows is the unit of work: its clean run, then its cells. Batches are dealt to the processes of a
distributed run, and what is finished is kept in `attnres.probe.pieces`. The tables are made of these parts, so they are
the same whether a run was interrupted or shared.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from attnres import faults
from attnres.data import ProbeWindows
from attnres.depth.families import FAMILIES, Cell, grid
from attnres.depth.plan import DepthPlan
from attnres.errors import NumericsError, StorageError
from attnres.interventions.donors import Pilot, donors, noise, reads_of, unavailable
from attnres.interventions.ids import DONOR_KINDS, Materials, Spec
from attnres.model.state import Trace
from attnres.probe.measure import Effects
from attnres.probe.observations import MassObserver, RoutingSums, routing_means, routing_table
from attnres.probe.passes import Clean, Subject, first_layer, run_clean, run_edited, run_rows, run_through
from attnres.probe.pieces import Key, Parts
from attnres.processes.ranks import Ranks

Split = Literal["pilot", "confirm"]
# The parts that come from a clean run.
OBSERVED = ("mass", "routing", "clean")
# Finished cells are written together if they come faster than this.
_SECONDS_BETWEEN_PARTS = 1.0
# Where cells share a pass: most tokens of it, and most bytes of its logits.
_MOST_TOKENS, _MOST_LOGITS = 2**15, 2**31


@dataclass(frozen=True)
class Tables:
    """Tidy tables: effects, mass and routing as the statistics and the report take them, and the clean NLL.

    `attribution` is empty where no estimates were asked for.
    """

    effects: pd.DataFrame
    mass: pd.DataFrame
    routing: pd.DataFrame
    clean: pd.DataFrame
    attribution: pd.DataFrame = field(default_factory=pd.DataFrame)


@dataclass(frozen=True)
class Execution:
    """How a grid is walked through.

    Attributes:
        windows: per split.
        batch_size: windows a batch; bounds memory, which does not grow with the number of cells.
        seed: of donors and noise.
        cells_per_pass: cells that share a forward pass as rows of one batch; None chooses: one on a CPU, where more
            gain nothing.
        parts: where finished pieces go.
        ranks: the processes that share the work.
        progress: called with the number of cells finished on a batch.
        stop: asked between cells; True ends the walk after what is finished is kept.
    """

    windows: Mapping[Split, ProbeWindows]
    batch_size: int
    seed: int = 0
    cells_per_pass: int | None = None
    parts: Parts = field(default_factory=Parts)
    ranks: Ranks = field(default_factory=Ranks)
    progress: Callable[[int], None] = lambda done: None
    stop: Callable[[], bool] = lambda: False

    def batches(self) -> Iterator[tuple[Split, int, slice]]:
        """Every batch of every split, in order."""
        for split, drawn in self.windows.items():
            for number, part in enumerate(batches(drawn, self.batch_size)):
                yield split, number, part

    def mine(self) -> list[tuple[Split, int, slice]]:
        """The batches of this process."""
        return [unit for index, unit in enumerate(self.batches()) if index % self.ranks.size == self.ranks.rank]

    def stopping(self) -> bool:
        """Whether this process or another one was asked to stop."""
        if self.stop():
            self.parts.ask_to_stop()
            return True
        return self.parts.asked_to_stop()


def batches(windows: ProbeWindows, batch_size: int) -> Iterator[slice]:
    for begin in range(0, len(windows), batch_size):
        yield slice(begin, min(begin + batch_size, len(windows)))


def slices(plan: DepthPlan, specs: Sequence[Spec]) -> tuple[Cell, ...]:
    """The cells whose mass is measured: the standard grid's, and those of the interventions."""
    wanted = [*grid(plan), *(part.cell(plan) for spec in specs for part in spec.parts)]
    return tuple(dict.fromkeys(cell for cell in wanted if cell.eligible and cell.family in FAMILIES))


@torch.no_grad()
def run_pilot(subject: Subject, specs: Sequence[Spec], execution: Execution) -> bool:
    """Clean runs of the pilot split, kept as parts; `pilot_of` reads them.

    Returns:
        Whether all of this process's batches were done, rather than a stop asked for.
    """
    for split, number, part in execution.mine():
        if split == "pilot" and not _observed(subject, execution, split, number):
            if execution.stopping():
                return False
            _clean_batch(subject, specs, execution, split, number, part, [])
    return True


def pilot_of(subject: Subject, execution: Execution) -> Pilot | None:
    """What the pilot split says about a model; None where there is no such split."""
    if "pilot" not in execution.windows:
        return None
    kept = _kept(subject, execution, ["pilot"])
    return Pilot.of(kept["mass"], routing_means(kept["routing"]))


@torch.no_grad()
def run_cells(subject: Subject, specs: Sequence[Spec], pilot: Pilot | None, execution: Execution) -> bool:
    """Effects of every intervention on this process's batches, from what is not yet kept as parts.

    Args:
        subject: the model.
        specs: those that are eligible in it.
        pilot: of this model.
        execution: how.

    Returns:
        Whether all was done, rather than a stop asked for.

    Raises:
        NumericsError: where an effect is not finite, naming the cell.
    """
    parts, plan = execution.parts, subject.plan
    for split, number, part in execution.mine():
        key = Key(subject.name, split, number, "effects")
        finished = parts.cells(key)
        todo = [spec for spec in specs if spec.id not in finished]
        execution.progress(len(specs) - len(todo))
        if not todo and _observed(subject, execution, split, number):
            continue
        if execution.stopping():
            return False
        starts = sorted({first_layer(spec, plan) for spec in todo})
        clean = _clean_batch(subject, specs, execution, split, number, part, starts)
        materials = _materials(subject, todo, pilot, execution, split, part)
        windows = execution.windows[split]
        identity = {"window": windows.window_ids[part].numpy(), "document": windows.document_ids[part].numpy()}
        found: list[pd.DataFrame] = []
        written = time.monotonic()
        for group in _passes(subject, specs, execution, clean):
            if finished.issuperset(spec.id for spec in group):
                continue
            for spec, measured in zip(group, _effects(subject, clean, group, materials), strict=True):
                values = {name: value.cpu().numpy() for name, value in measured._asdict().items()}
                if not all(np.isfinite(value).all() for value in values.values()):
                    raise NumericsError(
                        f"{subject.name}: {spec.id} gives a value that is not finite; check the checkpoint"
                    )
                found.append(pd.DataFrame(identity | {"cell": spec.id} | values))
            faults.point("probe.cell")
            execution.progress(len(group))
            stopping = execution.stopping()
            if stopping or time.monotonic() - written > _SECONDS_BETWEEN_PARTS:
                parts.put(key, pd.concat(found, ignore_index=True))
                found, written = [], time.monotonic()
            if stopping:
                return False
        if found:
            parts.put(key, pd.concat(found, ignore_index=True))
    return True


def tables_of(subject: Subject, specs: Sequence[Spec], execution: Execution) -> Tables:
    """The tables of a finished walk, from its parts.

    Raises:
        StorageError: where a part is missing, because it was damaged after it was written.
    """
    kept = _kept(subject, execution, list(execution.windows))
    cells = {spec.id: spec for spec in specs}
    order = {name: place for place, name in enumerate(cells)}
    found = []
    for split, number, _ in execution.batches():
        table = execution.parts.read(Key(subject.name, split, number, "effects"))
        if set(table["cell"] if len(table) else ()) != set(cells):
            raise damaged(subject, split, number)
        if len(table):
            table = table.sort_values("cell", key=lambda column: column.map(order), kind="stable")
            found.append(table.assign(model=subject.name, split=split))
    effects = pd.concat(found, ignore_index=True) if found else _empty_effects()
    coordinates = {name: _coordinates(spec, subject.plan) for name, spec in cells.items()}
    for column in ("intervention", "family", "sublayer", "band"):
        effects[column] = effects["cell"].map({name: where[column] for name, where in coordinates.items()})
    confirm = {name: table[table["split"] == "confirm"].reset_index(drop=True) for name, table in kept.items()}
    return Tables(
        effects[list(_empty_effects().columns)],
        kept["mass"],
        routing_table(subject, routing_means(confirm["routing"])),
        confirm["clean"],
    )


def run_grid(
    subject: Subject,
    interventions: Sequence[Spec],
    windows: Mapping[Split, ProbeWindows],
    batch_size: int,
    progress: Callable[[int], None] = lambda done: None,
    seed: int = 0,
    cells_per_pass: int | None = None,
) -> Tables:
    """Effects of every intervention on every window, with mass and routing from the clean runs: in memory, at one go.

    Args:
        subject: the model.
        interventions: those whose cell is eligible in it.
        windows: per split.
        batch_size: windows a forward pass.
        progress: called with the number of interventions finished on a batch.
        seed, cells_per_pass: see `Execution`.

    Raises:
        NumericsError: where an effect is not finite, naming the cell.
        ValueError: where an intervention cannot be carried out on these windows.
    """
    execution = Execution(windows, batch_size, seed, cells_per_pass, progress=progress)
    run_pilot(subject, interventions, execution)
    pilot = pilot_of(subject, execution)
    for spec in interventions:
        if reason := unavailable(spec, subject.plan, pilot, windows.get("pilot")):
            raise ValueError(f"{spec.id} in {subject.name}: {reason}; leave it out")
    run_cells(subject, interventions, pilot, execution)
    return tables_of(subject, interventions, execution)


def _clean_batch(
    subject: Subject,
    specs: Sequence[Spec],
    execution: Execution,
    split: Split,
    number: int,
    part: slice,
    starts: Sequence[int],
) -> Clean:
    """The clean run of a batch; what it says about mass and routing is kept if it is not yet."""
    windows, device = execution.windows[split], subject.model.lm_head.weight.device
    ids, labels = windows.input_ids[part].to(device), windows.labels[part].to(device)
    if _observed(subject, execution, split, number):
        return run_clean(subject.model, ids, labels, starts)
    mass, routing = MassObserver(subject.plan, slices(subject.plan, specs)), RoutingSums()

    def observe(trace: Trace) -> None:
        mass(trace)
        routing(trace)

    clean = run_clean(subject.model, ids, labels, starts, observe)
    identity: dict[str, Any] = {
        "model": subject.name,
        "window": windows.window_ids[part].numpy(),
        "document": windows.document_ids[part].numpy(),
        "split": split,
    }
    nll = pd.DataFrame(identity | {"nll": clean.readout.nll.mean(-1).cpu().numpy()})
    observed = {"mass": mass.table(identity), "routing": routing.table(split), "clean": nll}
    for kind in OBSERVED:
        execution.parts.put(Key(subject.name, split, number, kind), observed[kind])
    return clean


def _observed(subject: Subject, execution: Execution, split: str, number: int) -> bool:
    """Whether everything that the clean run of a batch says is kept."""
    return all(execution.parts.has(Key(subject.name, split, number, kind)) for kind in OBSERVED)


def _materials(
    subject: Subject, specs: Sequence[Spec], pilot: Pilot | None, execution: Execution, split: Split, part: slice
) -> Materials:
    """What these interventions borrow for a batch: one clean run of its donors, if any of them needs one."""
    plan, windows, device = subject.plan, execution.windows[split], subject.model.lm_head.weight.device
    weights: dict[int, Tensor] = {}
    sources: dict[int, tuple[Tensor, ...]] = {}
    if borrowed := reads_of(specs, plan, DONOR_KINDS):
        chosen = donors(windows, split, execution.windows["pilot"], execution.seed)[part]

        def keep(trace: Trace) -> None:
            if trace.site.read in borrowed:
                weights[trace.site.read], sources[trace.site.read] = trace.log_weights, trace.sources

        run_through(subject.model, execution.windows["pilot"].input_ids[chosen].to(device), [], keep)
    length, ids = windows.input_ids.shape[1], windows.window_ids[part].tolist()
    drawn = {
        read: noise(ids, split, read, length, plan.reads[read].num_sources, execution.seed).to(device)
        for read in reads_of(specs, plan, ["matched"])
    }
    return Materials({} if pilot is None else pilot.mean, weights, sources, drawn)


def _passes(subject: Subject, specs: Sequence[Spec], execution: Execution, clean: Clean) -> Iterator[Sequence[Spec]]:
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


def _effects(subject: Subject, clean: Clean, group: Sequence[Spec], materials: Materials) -> list[Effects]:
    if len(group) == 1:
        return [clean.readout.compare(run_edited(subject.model, clean, group[0], materials))]
    return run_rows(subject.model, clean, group, materials)


def _kept(subject: Subject, execution: Execution, splits: Sequence[Split]) -> dict[str, pd.DataFrame]:
    """The parts of the clean runs of some splits, in the order of the batches."""
    found: dict[str, list[pd.DataFrame]] = {kind: [] for kind in OBSERVED}
    for split, number, _ in execution.batches():
        for kind, tables in found.items() if split in splits else ():
            key = Key(subject.name, split, number, kind)
            if not execution.parts.has(key):
                raise damaged(subject, split, number)
            tables.append(execution.parts.last(key))
    return {kind: pd.concat(tables, ignore_index=True) for kind, tables in found.items()}


def damaged(subject: Subject, split: str, number: int) -> StorageError:
    """What to raise where a part that was kept is gone."""
    return StorageError(
        f"{subject.name}: batch {number} of split {split} was measured and cannot be read again; run the same command"
    )


def _coordinates(spec: Spec, plan: DepthPlan) -> dict[str, str]:
    cell = spec.cell(plan)
    return {"intervention": spec.what, "family": cell.family, "sublayer": cell.sublayer, "band": cell.band}


def _empty_effects() -> pd.DataFrame:
    columns = {"model": object, "window": "int64", "document": "int64", "split": object, "cell": object}
    columns |= dict.fromkeys(("intervention", "family", "sublayer", "band"), object)
    columns |= dict.fromkeys(("dnll", "kl", "flips"), "float32")
    return pd.DataFrame({name: pd.Series(dtype=kind) for name, kind in columns.items()})


def eligibility_table(
    subject: Subject,
    interventions: Sequence[Spec],
    pilot: Pilot | None = None,
    pilot_windows: ProbeWindows | None = None,
) -> pd.DataFrame:
    """One row per candidate cell: eligible or why not.

    The depth plan alone decides for most kinds; what borrows from the pilot split needs it, and the control `matched`
    a family that does not hold most of the mass there.

    Args:
        subject: the model.
        interventions: every candidate, the ineligible ones too.
        pilot: of this model; None where there is no pilot split.
        pilot_windows: of the pilot split.
    """
    rows = []
    for spec in interventions:
        cell = spec.cell(subject.plan)
        reason = cell.reason or unavailable(spec, subject.plan, pilot, pilot_windows)
        rows.append(
            {"model": subject.name, "cell": spec.id}
            | _coordinates(spec, subject.plan)
            | {
                "eligible": not reason,
                "reason": reason,
                "eligible_reads": len(cell.reads),
                "reads": cell.candidates,
                "mean_sources": cell.mean_sources,
            }
        )
    return pd.DataFrame(rows)

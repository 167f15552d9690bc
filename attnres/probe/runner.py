"""The one loop: every cell of the grid, on every window, from the clean state at its first edited layer."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor

from attnres.data import ProbeWindows
from attnres.errors import NumericsError
from attnres.model.families import Cell, band_layers, family_indices, family_of, grid
from attnres.model.loading import schedule_weights
from attnres.model.modeling import Context, Qwen3AttnResForCausalLM
from attnres.model.plan import DepthPlan
from attnres.model.state import DepthState, Trace
from attnres.probe.interventions import CLEAN, Intervention
from attnres.probe.measure import CleanReadout, measure_mass

Split = Literal["pilot", "confirm"]


@dataclass(frozen=True)
class Subject:
    """A model under the probe.

    Attributes:
        name: `"attnres"`, or the schedule of a wrapped baseline.
        model: in eval mode, on its device.
        schedule: `"recency"`, `"uniform"`, or None for learned routing.
        recency_bias: bias b of the recency schedule.
    """

    name: str
    model: Qwen3AttnResForCausalLM
    schedule: Literal["recency", "uniform"] | None = None
    recency_bias: float = 0.0

    @property
    def plan(self) -> DepthPlan:
        return self.model.model.plan


@dataclass(frozen=True)
class Clean:
    """The clean run of one batch of windows.

    Attributes:
        context: what the layers share; a cell replaces its edit.
        states: layer -> the state in front of it, for the layers where cells start.
        readout: the clean logits' summary.
        logits: `[B, T, V]`.
    """

    context: Context
    states: dict[int, DepthState]
    readout: CleanReadout
    logits: Tensor


@dataclass(frozen=True)
class Tables:
    """Tidy tables: effects, mass and routing as the statistics and the report take them, and the clean NLL."""

    effects: pd.DataFrame
    mass: pd.DataFrame
    routing: pd.DataFrame
    clean: pd.DataFrame


def first_layer(intervention: Intervention, plan: DepthPlan) -> int:
    """The first layer that an intervention can change."""
    edited = intervention.edit(plan).removed
    if edited:
        return plan.reads[min(edited)].layer
    return band_layers(intervention.band, plan.num_layers).start


def run_clean(
    model: Qwen3AttnResForCausalLM,
    input_ids: Tensor,
    labels: Tensor,
    starts: Sequence[int],
    observe: Callable[[Trace], None] | None = None,
) -> Clean:
    """One pass over all layers on the explicit path, keeping the state in front of each layer in `starts`."""
    decoder = model.model
    embeddings = decoder.embed_tokens(input_ids)
    context = decoder.context(embeddings, edit=CLEAN, observe=observe)
    state, states = decoder.embed(embeddings), {}
    for layer in range(decoder.config.num_hidden_layers):
        if layer in starts:
            states[layer] = state
        state = decoder.step(state, layer, context)
    logits = model.lm_head(decoder.finish(state, context))
    return Clean(replace(context, observe=None), states, CleanReadout.of(logits, labels), logits)


def run_edited(model: Qwen3AttnResForCausalLM, clean: Clean, intervention: Intervention) -> Tensor:
    """Logits `[B, T, V]` under an intervention, from the clean state at its first layer."""
    decoder = model.model
    context = replace(clean.context, edit=intervention.edit(decoder.plan))
    start = first_layer(intervention, decoder.plan)
    state = clean.states[start]
    for layer in range(start, decoder.config.num_hidden_layers):
        state = decoder.step(state, layer, context)
    return model.lm_head(decoder.finish(state, context))


def batches(windows: ProbeWindows, batch_size: int) -> Iterator[slice]:
    for begin in range(0, len(windows), batch_size):
        yield slice(begin, min(begin + batch_size, len(windows)))


@torch.no_grad()
def run_grid(
    subject: Subject,
    interventions: Sequence[Intervention],
    windows: dict[Split, ProbeWindows],
    batch_size: int,
    progress: Callable[[int], None],
) -> Tables:
    """Effects of every intervention on every window, with mass and routing from the clean runs.

    Args:
        subject: the model.
        interventions: those whose cell is eligible in it.
        windows: per split.
        batch_size: windows a forward pass; bounds memory, which does not grow with the number of cells.
        progress: called with the number of interventions finished on a batch.

    Raises:
        NumericsError: where an effect is not finite, naming the cell.
    """
    model, plan = subject.model, subject.plan
    device = model.lm_head.weight.device
    starts = sorted({first_layer(item, plan) for item in interventions})
    effects: list[pd.DataFrame] = []
    masses: list[pd.DataFrame] = []
    cleans: list[pd.DataFrame] = []
    routing = _RoutingMeans(subject)
    for split, drawn in windows.items():
        for part in batches(drawn, batch_size):
            observer = _MassObserver(plan)

            def observe(trace: Trace, observer: "_MassObserver" = observer, split: Split = split) -> None:
                observer(trace)
                if split == "confirm":
                    routing(trace)

            ids, labels = drawn.input_ids[part].to(device), drawn.labels[part].to(device)
            clean = run_clean(model, ids, labels, starts, observe)
            identity: dict[str, Any] = {
                "model": subject.name,
                "window": drawn.window_ids[part].numpy(),
                "document": drawn.document_ids[part].numpy(),
                "split": split,
            }
            masses.append(observer.table(identity))
            if split == "confirm":
                cleans.append(pd.DataFrame(identity | {"nll": clean.readout.nll.mean(-1).cpu().numpy()}))
            for item in interventions:
                measured = clean.readout.compare(run_edited(model, clean, item))
                values = {name: value.cpu().numpy() for name, value in measured._asdict().items()}
                if not all(pd.notna(value).all() for value in values.values()):
                    raise NumericsError(
                        f"{subject.name}: {item.id} gives a value that is not finite; check the checkpoint"
                    )
                cell = {"cell": item.id, "intervention": item.kind, "family": item.family}
                place = {"sublayer": item.sublayer, "band": item.band}
                effects.append(pd.DataFrame(identity | cell | place | values))
                progress(1)
    return Tables(
        pd.concat(effects, ignore_index=True) if effects else _empty_effects(),
        pd.concat(masses, ignore_index=True),
        routing.table(),
        pd.concat(cleans, ignore_index=True),
    )


def _empty_effects() -> pd.DataFrame:
    text = ["model", "split", "cell", "intervention", "family", "sublayer", "band"]
    columns = {name: pd.Series(dtype=object) for name in text}
    columns |= {name: pd.Series(dtype="int64") for name in ("window", "document")}
    return pd.DataFrame(columns | {name: pd.Series(dtype="float32") for name in ("dnll", "kl", "flips")})


class _MassObserver:
    """Collects mass over the eligible reads of every slice while a clean run goes by."""

    def __init__(self, plan: DepthPlan) -> None:
        self._cells: list[Cell] = [cell for cell in grid(plan) if cell.eligible]
        self._by_read: dict[int, list[Cell]] = {}
        for cell in self._cells:
            for read in cell.reads:
                self._by_read.setdefault(read, []).append(cell)
        self._sums: dict[Cell, Tensor] = {}
        self._plan = plan

    def __call__(self, trace: Trace) -> None:
        cells = self._by_read.get(trace.site.read, [])
        if not cells:
            return
        found = measure_mass(trace, tuple(cell.family for cell in cells))
        for cell in cells:
            values = torch.stack(list(found[cell.family]), dim=-1)
            self._sums[cell] = self._sums.get(cell, torch.zeros_like(values)) + values

    def table(self, identity: dict[str, Any]) -> pd.DataFrame:
        """One row per slice x window."""
        rows = []
        for cell in self._cells:
            mass, share, displacement = (self._sums[cell] / len(cell.reads)).double().cpu().unbind(-1)
            sizes = [self._plan.reads[j].num_sources for j in cell.reads]
            shares = [len(family_indices(cell.family, size)) / size for size in sizes]
            place = {"family": cell.family, "sublayer": cell.sublayer, "band": cell.band}
            values = {"mass": mass, "norm_share": share, "displacement": displacement}
            rows.append(
                pd.DataFrame(
                    identity
                    | place
                    | {name: value.numpy() for name, value in values.items()}
                    | {"uniform_share": sum(shares) / len(shares)}
                )
            )
        return pd.concat(rows, ignore_index=True)


class _RoutingMeans:
    """Mean routing weights per read and source, over everything observed."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._sums: dict[int, Tensor] = {}
        self._counts: dict[int, int] = {}

    def __call__(self, trace: Trace) -> None:
        weights = torch.exp(trace.log_weights).flatten(0, -2).double()
        read = trace.site.read
        self._sums[read] = self._sums.get(read, 0) + weights.sum(0)
        self._counts[read] = self._counts.get(read, 0) + weights.shape[0]

    def table(self) -> pd.DataFrame:
        subject, rows = self._subject, []
        for read in subject.plan.reads:
            if read.index not in self._sums:
                continue
            means = (self._sums[read.index] / self._counts[read.index]).tolist()
            expected: Sequence[float] = [float("nan")] * read.num_sources
            if subject.schedule is not None:
                expected = schedule_weights(read.num_sources, subject.schedule, subject.recency_bias)
            for source, (weight, analytic) in enumerate(zip(means, expected, strict=True)):
                rows.append(
                    {
                        "model": subject.name,
                        "read": read.index,
                        "layer": read.layer,
                        "sublayer": read.sublayer,
                        "source": source,
                        "num_sources": read.num_sources,
                        "weight": weight,
                        "analytic": analytic,
                        "role": family_of(source, read.num_sources),
                        "holds": str(read.sources[source]),
                    }
                )
        return pd.DataFrame(rows)


def eligibility_table(subject: Subject, interventions: Sequence[Intervention]) -> pd.DataFrame:
    """One row per candidate cell: eligible or why not, from the depth plan alone.

    Args:
        subject: the model.
        interventions: every candidate, the ineligible ones too.
    """
    slices = {(cell.family, cell.sublayer, cell.band): cell for cell in grid(subject.plan)}
    rows = []
    for item in interventions:
        assert item.family is not None
        cell = slices[item.family, item.sublayer, item.band]
        rows.append(
            {
                "model": subject.name,
                "intervention": item.kind,
                "cell": item.id,
                "family": cell.family,
                "sublayer": cell.sublayer,
                "band": cell.band,
                "eligible": cell.eligible,
                "reason": cell.reason,
                "eligible_reads": len(cell.reads),
                "reads": cell.candidates,
                "mean_sources": cell.mean_sources,
            }
        )
    return pd.DataFrame(rows)

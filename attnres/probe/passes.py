"""Passes through a model under the probe: the clean run, and an edited one from the clean state at its first layer."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from attnres.depth.families import place_reads
from attnres.depth.plan import DepthPlan
from attnres.interventions.edits import NO_EDIT, NO_INPUTS, Inputs, RowsEdit, edit
from attnres.interventions.ids import Spec
from attnres.model.modeling import Context, Qwen3AttnResForCausalLM
from attnres.model.state import DepthState, Edit, Trace
from attnres.ops import PreparedBlock
from attnres.probe.measure import CleanReadout, Effects


@dataclass(frozen=True)
class CleanRun:
    """The clean run of one batch of windows.

    Attributes:
        context: what the layers share; a cell replaces its edit.
        states: layer -> the state in front of it, for the layers where cells start.
        readout: the clean logits' summary.
        logits: `[B, T, V]`.
        sources: read -> its source vectors, S tensors `[B, T, D]`, for the reads that were asked for.
    """

    context: Context
    states: dict[int, DepthState]
    readout: CleanReadout
    logits: Tensor
    sources: dict[int, tuple[Tensor, ...]]


def first_layer(spec: Spec, plan: DepthPlan) -> int:
    """The first layer that an intervention can change; L where that is the final read."""
    reads = [plan.reads[j] for member in spec.members if member.kind != "noop" for j in member.cell(plan).reads]
    reads = reads or [read for member in spec.members for read in place_reads(plan, member.sublayer, member.band)]
    return min(read.layer for read in reads)


def run_through(
    model: Qwen3AttnResForCausalLM, input_ids: Tensor, starts: Sequence[int], observe: Callable[[Trace], None] | None
) -> tuple[Context, dict[int, DepthState], Tensor]:
    """One pass over all layers on the explicit path: context, states kept, last hidden state `[B, T, D]`."""
    decoder = model.model
    embeddings = decoder.embed_tokens(input_ids)
    context = decoder.context(embeddings, edit=NO_EDIT, observe=observe)
    state, states = decoder.embed(embeddings), {}
    for layer in range(decoder.config.num_hidden_layers + 1):
        if layer in starts:
            states[layer] = state
        if layer < decoder.config.num_hidden_layers:
            state = decoder.step(state, layer, context)
    return context, states, decoder.finish(state, context)


def run_clean(
    model: Qwen3AttnResForCausalLM,
    input_ids: Tensor,
    labels: Tensor,
    starts: Sequence[int],
    observe: Callable[[Trace], None] | None = None,
    sources_at: Collection[int] = (),
) -> CleanRun:
    """One pass over all layers on the explicit path.

    Args:
        starts: layers in front of which the state is kept.
        observe: called with the trace of every read.
        sources_at: reads whose source vectors are kept.
    """
    sources: dict[int, tuple[Tensor, ...]] = {}

    def look(trace: Trace) -> None:
        if trace.site.read in sources_at:
            sources[trace.site.read] = trace.sources
        if observe is not None:
            observe(trace)

    looks = look if sources_at or observe is not None else None
    context, states, hidden = run_through(model, input_ids, starts, looks)
    logits = model.lm_head(hidden)
    return CleanRun(replace(context, observe=None), states, CleanReadout.of(logits, labels), logits, sources)


def run_edited(model: Qwen3AttnResForCausalLM, clean: CleanRun, spec: Spec, inputs: Inputs = NO_INPUTS) -> Tensor:
    """Logits `[B, T, V]` under an intervention, from the clean state at its first layer."""
    plan = model.model.plan
    return run_from(model, clean, first_layer(spec, plan), edit(spec, plan, inputs))


def run_from(model: Qwen3AttnResForCausalLM, clean: CleanRun, start: int, change: Edit) -> Tensor:
    """Logits `[B, T, V]` from the clean state in front of layer `start`; bitwise the clean ones if none is edited."""
    return _onward(model, clean.states[start], start, replace(clean.context, edit=change))


def run_rows(
    model: Qwen3AttnResForCausalLM, clean: CleanRun, specs: Sequence[Spec], inputs: Inputs = NO_INPUTS
) -> list[Effects]:
    """Effects of several interventions with the same first layer in one pass, each on its own rows.

    The clean run goes along as the first rows, because effects are differences on the same path.
    """
    plan, (start, *others) = model.model.plan, {first_layer(spec, model.model.plan) for spec in specs}
    assert not others
    labels, count = clean.readout.labels, len(specs) + 1
    state = _repeated(clean.states[start], count)
    rows = RowsEdit([NO_EDIT, *(edit(spec, plan, inputs) for spec in specs)], len(labels))
    context = model.model.context(state.finished[0], edit=rows)
    first, *rest = _onward(model, state, start, context).split(len(labels))
    readout = CleanReadout.of(first, labels)
    return [readout.compare(logits) for logits in rest]


def _onward(model: Qwen3AttnResForCausalLM, state: DepthState, start: int, context: Context) -> Tensor:
    for layer in range(start, model.model.config.num_hidden_layers):
        state = model.model.step(state, layer, context)
    return model.lm_head(model.model.finish(state, context))


def _repeated(state: DepthState, count: int) -> DepthState:
    """The state of a batch that holds these windows `count` times over."""

    def rows(tensor: Tensor) -> Tensor:
        return tensor.repeat(count, *[1] * (tensor.ndim - 1))

    block = state.prepared
    if block is not None:
        block = PreparedBlock(tuple(map(rows, block.mixed)), rows(block.logits), rows(block.lse))
    current, update = (None if tensor is None else rows(tensor) for tensor in (state.current, state.update))
    return DepthState(tuple(map(rows, state.finished)), current, update, block)

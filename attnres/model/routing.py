"""One read inside the model: the names of its parameters, and the step from sources to sublayer input.

No other module spells a name of a routing parameter. The names are those of released checkpoints.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from transformers import initialization as init
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from attnres import ops
from attnres.depth.plan import DepthPlan, ReadPlan
from attnres.model.config import Qwen3AttnResConfig
from attnres.model.state import Context, DepthState, Site, Trace, VectorEdit
from attnres.ops import ReadParameters

# Name prefixes of the two reads of a layer, which own them, and of the final read, which the decoder owns.
PREFIXES = ("attn", "mlp")
FINAL = "final"


def is_routing(name: str) -> bool:
    """Whether a parameter, by its name in a checkpoint, belongs to a read: its query, key norm or bias."""
    return "_res_" in name


def is_query(name: str) -> bool:
    """Whether it is the query of a read."""
    return name.endswith("_res_proj.weight")


def is_bias(name: str) -> bool:
    """Whether it is the bias of a read."""
    return name.endswith("_res_bias")


def is_final(name: str) -> bool:
    """Whether it belongs to the final read."""
    return name.startswith(f"model.{FINAL}_res_")


class StoredRead(NamedTuple):
    """The parameters of one read as a checkpoint stores them.

    Attributes:
        query: `w [1, D]`.
        key_weight: `g [D]`.
        bias: `[1]` of the newest source, or `[S]`.
    """

    query: nn.Parameter
    key_weight: nn.Parameter
    bias: nn.Parameter


class RoutingVector(nn.Module):
    """A query or a key-norm weight: called, it returns its parameter.

    It is no `nn.Linear` and no norm, which quantisers and adapters take for what their call computes. Whatever brings
    parameters to the call of their module (offloading, sharding) brings this one.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self) -> Tensor:
        return self.weight


class DepthRead(nn.Module):
    """One read: what its stored parameters mean to `attnres.ops`.

    The parameters lie beside it, under the names of released checkpoints; `parameters_of` calls it with them.
    """

    def __init__(self, num_sources: int) -> None:
        super().__init__()
        self.num_sources = num_sources

    def forward(self, query: Tensor, key_weight: Tensor, bias: Tensor) -> ReadParameters:
        """Query `[D]`, key weight `[D]` and bias `[S]` from `w [1, D]`, `g [D]` and a bias `[1]` or `[S]`."""
        if bias.shape[-1] != self.num_sources:
            bias = F.pad(bias, (self.num_sources - 1, 0))
        return ReadParameters(query.squeeze(0), key_weight, bias)


def parameters_of(owner: nn.Module, prefix: str) -> ReadParameters:
    """The parameters of a read, from calls of the modules that `attach_read` has created."""
    query, key_weight = getattr(owner, f"{prefix}_res_proj")(), getattr(owner, f"{prefix}_res_norm")()
    read: ReadParameters = getattr(owner, f"{prefix}_res")(query, key_weight, getattr(owner, f"{prefix}_res_bias"))
    return read


def stored_read(owner: nn.Module, prefix: str) -> StoredRead:
    """The parameters of a read that `attach_read` has created."""
    proj, norm = getattr(owner, f"{prefix}_res_proj"), getattr(owner, f"{prefix}_res_norm")
    return StoredRead(proj.weight, norm.weight, getattr(owner, f"{prefix}_res_bias"))


def attach_read(owner: nn.Module, prefix: str, config: Qwen3AttnResConfig, read: ReadPlan) -> None:
    """Create a read and its parameters on the module that owns the sublayer.

    They are `{prefix}_res`, and `{prefix}_res_proj`, `{prefix}_res_norm` and `{prefix}_res_bias`.
    """
    entries = 1 if config.attnres_bias == "newest" else read.num_sources
    # A seed gives the body the same weights as in runs whose queries were drawn, as those of linear layers are.
    drawn = nn.Linear(config.hidden_size, 1, bias=False).weight.detach()
    owner.add_module(f"{prefix}_res_proj", RoutingVector(drawn))
    owner.add_module(f"{prefix}_res_norm", RoutingVector(torch.ones(config.hidden_size)))
    owner.add_module(f"{prefix}_res", DepthRead(read.num_sources))
    owner.register_parameter(f"{prefix}_res_bias", nn.Parameter(torch.zeros(entries)))


def init_read(owner: nn.Module, prefix: str, config: Qwen3AttnResConfig) -> None:
    """Start uniform: query zero, bias zero (the newest source's may be configured)."""
    query, key_weight, bias = stored_read(owner, prefix)
    init.normal_(query)  # see `attach_read`
    init.zeros_(query)
    init.ones_(key_weight)
    init.copy_(bias, newest_alone(bias, config.attnres_recency_bias_init))


def freeze_unreachable(read: StoredRead, routes: bool, content: bool) -> None:
    """Turn off gradients of the parameters of a read that no gradient reaches; never turn any on.

    A distributed run would otherwise wait for them.

    Args:
        routes: whether its weights can depend on anything; see `DepthPlan.routing_is_trainable`.
        content: whether they may depend on content; see `Qwen3AttnResConfig.attnres_content`.
    """
    if not (routes and content):
        read.query.requires_grad = read.key_weight.requires_grad = False
    if not routes:
        read.bias.requires_grad = False


def newest_alone(like: Tensor, value: float) -> Tensor:
    """The bias of a read at its start: `value` on the newest source, zero on the others."""
    bias = torch.zeros_like(like)
    bias[-1] = value
    return bias


def added(state: DepthState) -> Tensor | None:
    """The running state with the pending sublayer output added; None while it is empty."""
    if state.current is None or state.update is None:
        return state.update if state.current is None else state.current
    return state.current + state.update


def scored_together(plan: DepthPlan, apart: list[bool]) -> tuple[range, ...]:
    """For every read, the reads that are scored together with it: those of its block.

    Args:
        apart: for every layer, and for the decoder as the owner of the final read, whether its parameters may only be
            read in its own forward. Its reads are then scored there, by themselves.
    """
    groups: list[range] = []
    for block in plan.blocks:
        start = block[0]
        for read in block[1:]:
            if read.layer != start.layer and (apart[read.layer] or apart[read.layer - 1]):
                groups.extend([range(start.index, read.index)] * (read.index - start.index))
                start = read
        groups.extend([range(start.index, block[-1].index + 1)] * (block[-1].index + 1 - start.index))
    return tuple(groups)


def is_apart(owner: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a library has taken over the forward of a module: sharded, offloaded or placed on a device of its own.

    Its parameters are then whole, and on the device of its inputs, in that forward alone.
    """
    return type(owner) is not kind or "forward" in owner.__dict__


def is_untouched(norm: nn.Module, device: torch.device) -> bool:
    """Whether a norm is the library's own, on this device, and nobody listens to its calls: it may be fused."""
    return (
        type(norm) is Qwen3RMSNorm
        and "forward" not in norm.__dict__
        and not (norm._forward_hooks or norm._forward_pre_hooks or norm._backward_hooks or norm._backward_pre_hooks)
        and not torch_module._has_any_global_hook()
        and norm.weight.device == device
    )


def open_block(
    state: DepthState, read: ReadPlan, plan: DepthPlan, context: Context, eps: float, backend: str
) -> DepthState:
    """At the first read of a block: push the running state as a finished source, reset it, and score the block's reads.

    Under `cumulative` it is pushed and not reset. In front of the very first block there is nothing to push, and inside
    a block nothing happens, except where the parameters of its reads are not all at hand (`scored_together`).
    """
    if read.starts_block and read.index > 0:
        current = added(state)
        assert current is not None
        state = DepthState((*state.finished, current), current=None if plan.resets else current)
    together = context.together[read.index]
    if read.index != together.start:
        return state
    reads = context.parameters(together, state.finished[0].device)
    prepared = ops.prepare_block(state.finished, reads, eps, backend)
    return DepthState(state.finished, state.current, state.update, prepared)


def route(
    state: DepthState, read: ReadPlan, norm: Any, config: Qwen3AttnResConfig, context: Context, backend: str
) -> tuple[DepthState, Tensor]:
    """One read of an open block: the new state, and what the sublayer sees, `RMSNorm(h) [B, T, D]`.

    The norm is fused with the read. One that somebody listens to, or that a library has replaced or moved, is called.

    Raises:
        ValueError: where an edit removes every source of a row.
    """
    assert state.prepared is not None
    dtype, device = state.finished[0].dtype, state.finished[0].device
    edit, observe, together = context.edit, context.observe, context.together[read.index]
    (parameters,) = context.parameters([read.index], device)
    eps, block, index = config.rms_norm_eps, state.prepared, read.index - together.start
    # Dividing the eps by S^2 is the same as multiplying h by S.
    scale = read.num_sources if config.attnres_exact_uniform else 1
    norm_eps = eps / scale**2
    site = Site.of(read)
    edited = edit is not None and edit.names(site)
    fused = is_untouched(norm, device)
    if edited or not fused:
        current = added(state)
        logit = None if current is None else ops.current_logit(current, parameters, eps)
    else:
        current, normed, logit = ops.merge(
            block,
            index,
            state.current,
            state.update,
            parameters,
            norm.weight,
            eps,
            norm_eps,
            dtype=dtype,
            backend=backend,
        )
    still_open = read.index + 1 < together.stop
    state = DepthState(state.finished, current, None, block if still_open else None)
    if not edited and fused and observe is None:
        return state, normed
    sources = state.finished if current is None else (*state.finished, current)
    log_weights = ops.log_weights(block, index, logit)
    mixed = sources
    if edit is not None and edited:
        changed = edit(site, log_weights)
        if changed is not log_weights:
            # Rows that the edit left alone stay bitwise what they were: rows of one batch may be edited differently.
            alone = (changed == log_weights).all(-1, keepdim=True)
            log_weights = torch.where(alone, log_weights, torch.log_softmax(changed, dim=-1))
            if bool(torch.isnan(log_weights).any()):
                where = f"read {site.read} ({site.sublayer} of layer {site.layer})"
                raise ValueError(f"edit: every source of a row is removed at {where}; leave at least one")
        mixed = edit.vectors(site, sources) if isinstance(edit, VectorEdit) else sources
    if not fused:
        normed = norm((scale * ops.mix(mixed, torch.exp(log_weights))).to(dtype)).to(dtype)
    elif edited:
        normed = ops.mix_and_norm(mixed, torch.exp(log_weights), norm.weight, norm_eps)
    if observe is not None:
        observe(Trace(site, log_weights, sources, norm_eps))
    return state, normed

"""One read inside the model: the names of its parameters, and the step from sources to sublayer input.

No other module spells a name of a routing parameter. The names are those of released checkpoints.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
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


class RoutingVector(nn.Module):
    """A query or a key-norm weight: called, it returns its parameter.

    It is no `nn.Linear` and no norm, which quantisers and adapters take for what their call computes.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self) -> Tensor:
        return self.weight


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


def stored_read(owner: nn.Module, prefix: str) -> StoredRead:
    """The parameters of a read that `attach_read` has created."""
    proj, norm = getattr(owner, f"{prefix}_res_proj"), getattr(owner, f"{prefix}_res_norm")
    return StoredRead(proj.weight, norm.weight, getattr(owner, f"{prefix}_res_bias"))


def attach_read(owner: nn.Module, prefix: str, config: Qwen3AttnResConfig, plan: DepthPlan, read: ReadPlan) -> None:
    """Create `{prefix}_res_proj`, `{prefix}_res_norm` and `{prefix}_res_bias` on the module that owns the sublayer.

    Parameters that no gradient can reach (one source, or equal ones) or that the configuration freezes have
    `requires_grad=False`: a distributed run would otherwise wait for them.
    """
    entries = 1 if config.attnres_bias == "newest" else read.num_sources
    # A seed gives the body the same weights as in runs whose queries were drawn, as those of linear layers are.
    proj = RoutingVector(nn.Linear(config.hidden_size, 1, bias=False).weight.detach())
    norm = RoutingVector(torch.ones(config.hidden_size))
    bias = nn.Parameter(torch.zeros(entries))
    trainable = plan.routing_is_trainable(read)
    for parameter in (proj.weight, norm.weight):
        parameter.requires_grad = trainable and config.attnres_content
    bias.requires_grad = read.num_sources > 1 and trainable
    owner.add_module(f"{prefix}_res_proj", proj)
    owner.add_module(f"{prefix}_res_norm", norm)
    owner.register_parameter(f"{prefix}_res_bias", bias)


def init_read(owner: nn.Module, prefix: str, config: Qwen3AttnResConfig) -> None:
    """Start uniform: query zero, bias zero (the newest source's may be configured)."""
    query, key_weight, bias = stored_read(owner, prefix)
    init.normal_(query)  # see `attach_read`
    init.zeros_(query)
    init.ones_(key_weight)
    init.copy_(bias, newest_alone(bias, config.attnres_recency_bias_init))


def newest_alone(like: Tensor, value: float) -> Tensor:
    """The bias of a read at its start: `value` on the newest source, zero on the others."""
    bias = torch.zeros_like(like)
    bias[-1] = value
    return bias


def read_parameters(stored: StoredRead, num_sources: int) -> ReadParameters:
    """The parameters of a read as `attnres.ops` takes them: the bias padded to one entry a source."""
    bias: Tensor = stored.bias
    if bias.shape[-1] != num_sources:
        bias = F.pad(bias, (num_sources - 1, 0))
    return ReadParameters(stored.query.squeeze(0), stored.key_weight, bias)


def added(state: DepthState) -> Tensor | None:
    """The running state with the pending sublayer output added; None while it is empty."""
    if state.current is None or state.update is None:
        return state.update if state.current is None else state.current
    return state.current + state.update


def open_block(
    state: DepthState, read: ReadPlan, plan: DepthPlan, context: Context, eps: float, backend: str
) -> DepthState:
    """At the first read of a block: push the running state as a finished source, reset it, and score the block's reads.

    Under `cumulative` it is pushed and not reset. In front of the very first block there is nothing to push, and inside
    a block nothing happens.
    """
    if not read.starts_block:
        return state
    if read.index > 0:
        current = added(state)
        assert current is not None
        state = DepthState((*state.finished, current), current=None if plan.resets else current)
    reads = [context.reads[peer.index] for peer in plan.blocks[read.block]]
    return replace(state, prepared=ops.prepare_block(state.finished, reads, eps, backend))


def route(
    state: DepthState, read: ReadPlan, norm: Qwen3RMSNorm, config: Qwen3AttnResConfig, context: Context, backend: str
) -> tuple[DepthState, Tensor]:
    """One read of an open block: the new state, and what the sublayer sees, `RMSNorm(h) [B, T, D]`.

    Raises:
        ValueError: where an edit removes every source of a row.
    """
    assert state.prepared is not None
    parameters, edit, observe = context.reads[read.index], context.edit, context.observe
    eps, block, index = config.rms_norm_eps, state.prepared, read.index_in_block
    norm_eps = eps / read.num_sources**2 if config.attnres_exact_uniform else eps
    site = Site.of(read)
    edited = edit is not None and edit.names(site)
    if edited:
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
            dtype=state.finished[0].dtype,
            backend=backend,
        )
    state = DepthState(state.finished, current, None, block)
    if not edited and observe is None:
        return state, normed
    sources = state.finished if current is None else (*state.finished, current)
    log_weights = ops.log_weights(block, index, logit)
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
        normed = ops.mix_and_norm(mixed, torch.exp(log_weights), norm.weight, norm_eps)
    if observe is not None:
        observe(Trace(site, log_weights, sources, norm_eps))
    return state, normed

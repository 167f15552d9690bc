"""The read in plain torch, two-phase: finished sources once per block, the running state once per read.

Routing queries are parameters, so every read of a block can be scored against the finished sources in one matrix
product before any of them runs (`prepare_block`). A read then merges the running state into what is already there,
an online softmax with two terms, and applies the RMS norm that the sublayer needs (`merge`). Both have hand-written
backward passes: each source's gradient is formed once per block instead of once per read. Equations and their
derivation are in `README.md`; `reference.py` is the truth.

All arithmetic is fp32 (fp64 for fp64 sources).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class ReadParameters(NamedTuple):
    """Parameters of one read over S sources.

    Attributes:
        query: `w [D]`.
        key_weight: `g [D]`.
        bias: `[S]` or `[B, S]`, or None for zero.
    """

    query: Tensor
    key_weight: Tensor
    bias: Tensor | None = None


class PreparedBlock(NamedTuple):
    """What the reads of one block share: M reads over n finished sources.

    Attributes:
        mixed: M tensors `[B, T, D]`: the mix over the finished sources alone.
        logits: `[B, T, M, n]` fp32.
        lse: `[B, T, M]` fp32: log-sum-exp of the logits over the finished sources.
    """

    mixed: tuple[Tensor, ...]
    logits: Tensor
    lse: Tensor


class Merged(NamedTuple):
    """One read, done.

    Attributes:
        current: `[B, T, D]` the running state with the pending sublayer output added, or None where it is empty.
        normed: `[B, T, D]` RMS norm of the mix: what the sublayer sees.
        logit: `[B, T]` fp32 logit of the running state, or None where it is empty.
    """

    current: Tensor | None
    normed: Tensor
    logit: Tensor | None


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _rstd(x: Tensor, eps: float) -> Tensor:
    """`rsqrt(mean_d(x^2) + eps)`, `[..., D] -> [...]`, without materialising the square."""
    return torch.rsqrt(torch.linalg.vector_norm(x, dim=-1).square() / x.shape[-1] + eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x * rstd(x) * weight`, computed in fp32 (fp64), returned in that dtype."""
    x = x.to(_exact(x.dtype))
    return (x * _rstd(x, eps).unsqueeze(-1)).mul_(weight.to(x.dtype))


class _Inter(torch.autograd.Function):
    """n finished sources x M queries -> logits, their log-sum-exp, M mixes."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, bias: Tensor, eps: float, *sources: Tensor) -> tuple[Tensor, ...]:
        values = torch.stack(sources, dim=-2).to(_exact(sources[0].dtype)).flatten(0, 1)  # [N, n, D]
        rstd = _rstd(values, eps)
        scores = ((values @ queries.T) * rstd.unsqueeze(-1)).transpose(-1, -2)  # [N, M, n]
        logits = (scores.unflatten(0, sources[0].shape[:2]) + bias).contiguous()
        lse = torch.logsumexp(logits, dim=-1)
        # A read whose finished sources are all masked has lse = -inf and no mass here: all of it is on the state.
        weights = torch.softmax(logits, dim=-1).masked_fill_(torch.isneginf(lse).unsqueeze(-1), 0.0).flatten(0, 1)
        mixed = torch.bmm(weights, values).unflatten(0, sources[0].shape[:2])
        ctx.save_for_backward(values, queries, rstd, scores, weights)
        ctx.bias_shape, ctx.dtypes = bias.shape, [source.dtype for source in sources]
        return logits, lse, *mixed.unbind(-2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_logits: Tensor, d_lse: Tensor, *d_mixed: Tensor) -> tuple[Tensor | None, ...]:
        values, queries, rstd, scores, weights = ctx.saved_tensors
        width, m = values.shape[-1], len(queries)
        d_mix = torch.stack(d_mixed, dim=-2).to(values.dtype).flatten(0, 1)  # [N, M, D]
        d_weights = torch.bmm(values, d_mix.transpose(-1, -2)).transpose(-1, -2)  # [N, M, n]
        mean = (weights * d_weights).sum(-1, keepdim=True)
        d_score = weights * (d_weights - mean + d_lse.flatten(0, 1).unsqueeze(-1)) + d_logits.flatten(0, 1)
        d_bias = d_score.unflatten(0, d_logits.shape[:2]).sum_to_size(ctx.bias_shape)
        through_rms = -(d_score * scores).sum(-2) * rstd.square() / width  # [N, n]
        d_dot = (d_score * rstd.unsqueeze(-2)).transpose(-1, -2).reshape(-1, m)  # [N n, M]
        d_queries = d_dot.T @ values.view(-1, width)
        d_values = torch.bmm(weights.transpose(-1, -2), d_mix)
        d_values.view(-1, width).addmm_(d_dot, queries)
        d_values.addcmul_(values, through_rms.unsqueeze(-1))
        d_sources = d_values.unflatten(0, d_logits.shape[:2]).unbind(-2)
        return d_queries, d_bias, None, *(g.to(dtype) for g, dtype in zip(d_sources, ctx.dtypes, strict=True))


class _Merge(torch.autograd.Function):
    """Add the sublayer output to the state, merge the state into the prepared mix, normalise."""

    @staticmethod
    def forward(
        ctx: Any,
        current: Tensor,
        update: Tensor | None,
        mixed: Tensor,
        lse: Tensor,
        query: Tensor,
        bias: Tensor,
        norm_weight: Tensor,
        eps: float,
        norm_eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        total = current if update is None else current + update
        state = total.to(_exact(total.dtype))
        rstd = _rstd(state, eps)
        score = rstd * (state @ query)
        logit = score + bias
        beta = torch.sigmoid(logit - lse)
        h = torch.lerp(mixed, state, beta.unsqueeze(-1))
        h_rstd = _rstd(h, norm_eps)
        normed = (h * h_rstd.unsqueeze(-1)).mul_(norm_weight)
        ctx.save_for_backward(total, mixed, query, norm_weight, rstd, score, beta, h_rstd)
        ctx.has_update, ctx.bias_shape = update is not None, bias.shape
        # An autograd function may not return its input as a fresh output: hand out a view.
        return total.view_as(total), normed.to(total.dtype), logit

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor, d_normed: Tensor, d_logit: Tensor) -> tuple[Tensor | None, ...]:
        total, mixed, query, norm_weight, rstd, score, beta, h_rstd = ctx.saved_tensors
        state = total.to(mixed.dtype)
        width = state.shape[-1]
        d_normed = d_normed.to(mixed.dtype)
        h = torch.lerp(mixed, state, beta.unsqueeze(-1))
        h_hat = h.mul_(h_rstd.unsqueeze(-1))
        d_hat_weighted = d_normed * h_hat
        d_norm_weight = d_hat_weighted.flatten(0, -2).sum(0)
        projection = (d_hat_weighted @ norm_weight) / width  # mean of d_hat * h_hat
        d_h = (d_normed * norm_weight).addcmul_(h_hat, projection.unsqueeze(-1), value=-1)
        d_h.mul_(h_rstd.unsqueeze(-1))
        d_beta = torch.sub(state, mixed).mul_(d_h).sum(-1)
        d_gate = d_beta * beta * (1 - beta)
        d_score = d_gate + d_logit
        d_state = (d_h * beta.unsqueeze(-1)).add_(d_total)
        d_mixed = d_h.mul_((1 - beta).unsqueeze(-1))
        d_dot = d_score * rstd
        d_state.view(-1, width).addr_(d_dot.flatten(), query)
        d_state.addcmul_(state, (-d_score * score * rstd.square() / width).unsqueeze(-1))
        d_query = d_dot.flatten() @ state.view(-1, width)
        d_bias = d_score.sum_to_size(ctx.bias_shape)
        d_out = d_state.to(total.dtype)
        return d_out, d_out if ctx.has_update else None, d_mixed, -d_gate, d_query, d_bias, d_norm_weight, None, None


def _folded(read: ReadParameters, dtype: torch.dtype) -> Tensor:
    return read.query.to(dtype) * read.key_weight.to(dtype)


def prepare_block(sources: Sequence[Tensor], reads: Sequence[ReadParameters], eps: float) -> PreparedBlock:
    """Plain-torch backend of `attnres.ops.prepare_block`."""
    n, exact = len(sources), _exact(sources[0].dtype)
    queries = torch.stack([_folded(read, exact) for read in reads])
    rows = [queries.new_zeros(n) if read.bias is None else read.bias[..., :n].to(exact) for read in reads]
    per_row = any(row.ndim == 2 for row in rows)
    rows = [row.expand(sources[0].shape[0], n) if per_row else row for row in rows]
    bias = torch.stack(rows, dim=-2)  # [M, n] or [B, M, n]
    logits, lse, *mixed = _Inter.apply(queries, bias.unsqueeze(1) if per_row else bias, eps, *sources)
    return PreparedBlock(tuple(mixed), logits, lse)


def merge(
    block: PreparedBlock,
    index: int,
    current: Tensor | None,
    update: Tensor | None,
    read: ReadParameters,
    norm_weight: Tensor,
    eps: float,
    norm_eps: float,
    dtype: torch.dtype,
) -> Merged:
    """Plain-torch backend of `attnres.ops.merge`."""
    mixed = block.mixed[index]
    if current is None:
        current, update = update, None
    if current is None:
        return Merged(None, rms_norm(mixed, norm_weight, norm_eps).to(dtype), None)
    n = block.logits.shape[-1]
    bias = mixed.new_zeros(1) if read.bias is None else read.bias[..., n:].to(mixed.dtype)  # [1] or [B, 1]
    args = (current, update, mixed, block.lse[..., index], _folded(read, mixed.dtype), bias)
    return Merged(*_Merge.apply(*args, norm_weight.to(mixed.dtype), eps, norm_eps))


def current_logit(current: Tensor, read: ReadParameters, eps: float) -> Tensor:
    """Plain-torch `attnres.ops.current_logit`; one pass over the state, so it needs no other backend."""
    state = current.to(_exact(current.dtype))
    logit = _rstd(state, eps) * (state @ _folded(read, state.dtype))
    return logit if read.bias is None else logit + read.bias[..., -1:].to(state.dtype)

"""The read in plain torch, two-phase: finished sources once per block, the running state once per read.

Routing queries are parameters, so every read of a block can be scored against the finished sources in one matrix
product before any of them runs (`prepare_block`). A read then merges the running state into what is already there,
an online softmax with two terms, and applies the RMS norm that the sublayer needs (`merge`). Both have hand-written
backward passes: each source's gradient is formed once per block instead of once per read. Equations and their
derivation are in `README.md`; `reference.py` is the truth.

All arithmetic is fp32 (fp64 for fp64 sources).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
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


def _in_full_precision(backward: Any) -> Any:
    """Autocast off in a backward pass: a compiled one is traced under the autocast that surrounds the forward."""

    @functools.wraps(backward)
    def run(ctx: Any, *gradients: Tensor | None) -> Any:
        with torch.autocast(ctx.device_type, enabled=False):
            return backward(ctx, *gradients)

    return run


def _mix(weights: Tensor, values: Tensor) -> Tensor:
    """`weights @ values`, `[N, M, n] @ [N, n, D] -> [N, M, D]`, for a handful of rows n, where `torch.bmm` is slow.

    An output is an embedding bag: the weighted sum of n rows of a table. That kernel writes all of them in one pass.
    """
    tokens, reads, n = weights.shape
    rows = torch.arange(tokens * n, device=values.device).view(tokens, 1, n).expand(-1, reads, -1).reshape(-1, n)
    table, weights = values.reshape(tokens * n, -1), weights.reshape(-1, n)
    return F.embedding_bag(rows, table, mode="sum", per_sample_weights=weights).unflatten(0, (tokens, reads))


_TRACES_WRONGLY = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13)


class _Unsaved:
    """Stands for the context of a function whose own backward pass will not run."""

    def save_for_backward(self, *tensors: Tensor) -> None:
        pass

    def set_materialize_grads(self, value: bool) -> None:
        pass


class _ReadBlock(torch.autograd.Function):
    """n finished sources x M queries -> logits, their log-sum-exp, M mixes.

    Logits live as `[n, N, M]` (N = B T): reductions over a handful of sources are then whole-vector operations.
    """

    @staticmethod
    def forward(ctx: Any, queries: Tensor, bias: Tensor, eps: float, *sources: Tensor) -> tuple[Tensor, ...]:
        batch, tokens, width = sources[0].shape
        values = torch.stack(sources, dim=-2).to(_exact(sources[0].dtype)).flatten(0, 1)  # [N, n, D]
        rstd = _rstd(values, eps).T.contiguous().unsqueeze(-1)  # [n, N, 1]
        scores = (values @ queries.T).transpose(0, 1).contiguous().mul_(rstd)  # [n, N, M]
        logits = (scores.unflatten(1, (batch, tokens)) + bias).flatten(1, 2)
        lse = torch.logsumexp(logits, dim=0)
        weights = torch.softmax(logits, dim=0)
        # A read whose finished sources are all masked has lse = -inf and no mass here: all of it is on the state.
        weights = weights.masked_fill_(torch.isneginf(lse), 0.0)
        # The mix of one source is that source.
        mixed = _mix(weights.permute(1, 2, 0), values) if len(sources) > 1 else values.expand(-1, len(queries), -1)
        ctx.save_for_backward(values, queries, rstd, scores, weights)
        ctx.bias_shape, ctx.tokens, ctx.device_type = bias.shape, (batch, tokens), values.device.type
        ctx.dtypes = [source.dtype for source in sources]
        ctx.set_materialize_grads(False)
        by_token = logits.permute(1, 2, 0).unflatten(0, (batch, tokens))  # [B, T, M, n]
        return by_token, lse.unflatten(0, (batch, tokens)), *mixed.unflatten(0, (batch, tokens)).unbind(-2)

    @staticmethod
    @once_differentiable
    @_in_full_precision
    def backward(  # type: ignore[override]
        ctx: Any, d_logits: Tensor | None, d_lse: Tensor | None, *d_mixed: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        values, queries, rstd, scores, weights = ctx.saved_tensors
        width, m = values.shape[-1], len(queries)
        zero = values.new_zeros(()).expand(values.shape[0], width)
        d_mix = torch.stack([zero if d is None else d.to(values.dtype).flatten(0, 1) for d in d_mixed], dim=-2)
        d_weights = torch.bmm(d_mix, values.transpose(-1, -2)).permute(2, 0, 1).contiguous()  # [n, N, M]
        shift = -(weights * d_weights).sum(0)
        shift = shift if d_lse is None else shift + d_lse.flatten(0, 1)
        d_score = d_weights.add_(shift).mul_(weights)
        if d_logits is not None:
            d_score += d_logits.flatten(0, 1).permute(2, 0, 1)
        through_rms = -(d_score * scores).sum(-1, keepdim=True) * rstd.square() / width  # [n, N, 1]
        d_dot = (d_score * rstd).transpose(0, 1).reshape(-1, m)  # [N n, M]
        d_queries = d_dot.T @ values.view(-1, width)
        d_values = _mix(weights.transpose(0, 1), d_mix)
        d_values.view(-1, width).addmm_(d_dot, queries)
        d_values.addcmul_(values, through_rms.transpose(0, 1))
        d_bias = d_score.unflatten(1, ctx.tokens).sum_to_size(ctx.bias_shape)
        d_sources = d_values.unflatten(0, ctx.tokens).unbind(-2)
        return d_queries, d_bias, None, *(g.to(dtype) for g, dtype in zip(d_sources, ctx.dtypes, strict=True))


def _norm_backward(d_normed: Tensor, hat: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Backward of `hat * weight` with `hat = x * rstd(x)`.

    Returns:
        The gradient of x divided by its rstd `[..., D]`, the projection `mean_d(d_hat * hat)` `[...]`, and the gradient
        of the weight `[D]`.
    """
    buffer = d_normed * hat
    d_weight = buffer.flatten(0, -2).sum(0)
    projection = (buffer @ weight) / hat.shape[-1]
    d_x = torch.mul(d_normed, weight, out=buffer)
    return d_x.addcmul_(hat, projection.unsqueeze(-1), value=-1), projection, d_weight


class _Norm(torch.autograd.Function):
    """RMS norm of a read without running state."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rstd = _rstd(x, eps).unsqueeze(-1)
        hat = x * rstd
        ctx.save_for_backward(hat, weight, rstd)
        ctx.device_type = x.device.type
        return hat * weight

    @staticmethod
    @once_differentiable
    @_in_full_precision
    def backward(ctx: Any, d_normed: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hat, weight, rstd = ctx.saved_tensors
        d_x, _, d_weight = _norm_backward(d_normed, hat, weight)
        return d_x.mul_(rstd), d_weight, None


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
        # In place, except where autograd needs h itself.
        h_hat = h * h_rstd.unsqueeze(-1) if isinstance(ctx, _Unsaved) else h.mul_(h_rstd.unsqueeze(-1))
        ctx.save_for_backward(total, h_hat, query, norm_weight, rstd, score, beta, h_rstd)
        ctx.has_update, ctx.bias_shape, ctx.norm_eps = update is not None, bias.shape, norm_eps
        ctx.device_type = total.device.type
        ctx.set_materialize_grads(False)
        # An autograd function may not return its input as a fresh output: hand out a view.
        return total.view_as(total), (h_hat * norm_weight).to(total.dtype), logit

    @staticmethod
    @once_differentiable
    @_in_full_precision
    def backward(  # type: ignore[override]
        ctx: Any, d_total: Tensor | None, d_normed: Tensor | None, d_logit: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        total, h_hat, query, norm_weight, rstd, score, beta, h_rstd = ctx.saved_tensors
        state = total.to(h_hat.dtype)
        d_normed = torch.zeros_like(state) if d_normed is None else d_normed.to(h_hat.dtype)
        width = state.shape[-1]
        # d_h lacks the factor h_rstd, which is folded into what it meets next.
        d_h, projection, d_norm_weight = _norm_backward(d_normed, h_hat, norm_weight)
        # d_beta = d_h . (state - mixed), and h is their mix: beta (1 - beta) d_beta = beta (d_h . state - d_h . h).
        # RMS norm leaves d_h . h = projection * width * eps * h_rstd^2, which needs no pass over h.
        d_state = d_h * state  # until its sum is taken, a buffer
        against_state = d_state.sum(-1) * h_rstd
        d_gate = beta * (against_state - projection * width * ctx.norm_eps * h_rstd.square())
        d_score = d_gate if d_logit is None else d_gate + d_logit
        d_dot = d_score * rstd
        through_mix = (beta * h_rstd).unsqueeze(-1)
        if d_total is None:
            torch.mul(d_h, through_mix, out=d_state)
        else:
            torch.addcmul(d_total.to(h_hat.dtype), d_h, through_mix, out=d_state)
        d_state.addcmul_(d_dot.unsqueeze(-1), query)
        d_state.addcmul_(state, (-d_score * score * rstd.square() / width).unsqueeze(-1))
        d_mixed = d_h.mul_(((1 - beta) * h_rstd).unsqueeze(-1))
        d_query = d_dot.flatten() @ state.view(-1, width)
        d_bias = d_score.sum_to_size(ctx.bias_shape)
        d_out = d_state.to(total.dtype)
        return d_out, d_out if ctx.has_update else None, d_mixed, -d_gate, d_query, d_bias, d_norm_weight, None, None


def _applied(function: Any) -> Callable[..., Any]:
    """A function with its own backward pass; where torch would trace that wrongly, with autograd's.

    torch 2.11 loses the gradients of a second call of one function in a compiled graph, as a layer has it: its MLP
    read had none. 2.13 does not.
    """
    if _TRACES_WRONGLY and torch.compiler.is_compiling():
        return functools.partial(function.forward, _Unsaved())
    return function.apply


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x * rstd(x) * weight`, computed and returned in fp32 (fp64)."""
    exact = _exact(x.dtype)
    return _applied(_Norm)(x.to(exact), weight.to(exact), eps)


def _folded(read: ReadParameters, dtype: torch.dtype) -> Tensor:
    return read.query.to(dtype) * read.key_weight.to(dtype)


def prepare_block(sources: Sequence[Tensor], reads: Sequence[ReadParameters], eps: float) -> PreparedBlock:
    """Plain-torch backend of `attnres.ops.prepare_block`."""
    n, exact = len(sources), _exact(sources[0].dtype)
    queries = torch.stack([_folded(read, exact) for read in reads])
    rows = [queries.new_zeros(n) if read.bias is None else read.bias[..., :n].to(exact) for read in reads]
    if any(row.ndim == 2 for row in rows):
        rows = [row.expand(sources[0].shape[0], n) for row in rows]
        bias = torch.stack(rows, dim=-1).transpose(0, 1).unsqueeze(2)  # [n, B, 1, M]
    else:
        bias = torch.stack(rows, dim=-1)[:, None, None, :]  # [n, 1, 1, M]
    # torch before 2.15 mixes up the arguments where it traces a function of a variable number without gradients.
    read: Any = _ReadBlock.apply if torch.is_grad_enabled() else functools.partial(_ReadBlock.forward, _Unsaved())
    logits, lse, *mixed = read(queries, bias, eps, *sources)
    return PreparedBlock(tuple(mixed), logits, lse)


def merge(
    block: PreparedBlock,
    index: int,
    current: Tensor,
    update: Tensor | None,
    read: ReadParameters,
    norm_weight: Tensor,
    eps: float,
    norm_eps: float,
) -> Merged:
    """Plain-torch backend of `attnres.ops.merge` where there is a running state."""
    mixed = block.mixed[index]
    n = block.logits.shape[-1]
    bias = mixed.new_zeros(1) if read.bias is None else read.bias[..., n:].to(mixed.dtype)  # [1] or [B, 1]
    args = (current, update, mixed, block.lse[..., index], _folded(read, mixed.dtype), bias)
    return Merged(*_applied(_Merge)(*args, norm_weight.to(mixed.dtype), eps, norm_eps))


def current_logit(current: Tensor, read: ReadParameters, eps: float) -> Tensor:
    """Plain-torch `attnres.ops.current_logit`; one pass over the state, so it needs no other backend."""
    state = current.to(_exact(current.dtype))
    logit = _rstd(state, eps) * (state @ _folded(read, state.dtype))
    return logit if read.bias is None else logit + read.bias[..., -1:].to(state.dtype)

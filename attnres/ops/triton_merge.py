"""Add the sublayer output to the state, merge the state into the prepared mix, normalise. Equations in `README.md`.

The backward pass takes the gradient of the new state and returns that of the old one, so the chain of states needs no
additions by autograd. Without a state (`norm`) the same kernels do the norm alone.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnres.ops.triton_common import Launch, bias_gradient, contiguous, empty, on_device
from attnres.ops.triton_read import PROGRAMS


@triton.jit
def merge_forward_kernel(
    current,
    update,
    mixed,
    lse,
    lse_stride,
    query,
    bias,
    bias_stride,
    norm_weight,
    state,
    normed,
    logits,
    stats,
    tokens,
    tokens_per_row,
    eps,
    norm_eps,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.arange(0, BLOCK_D)
    live = t < tokens
    inside = live[:, None] & (d < D)[None, :]
    at = t[:, None] * D + d[None, :]
    h = tl.load(mixed + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(norm_weight + d, mask=d < D, other=0.0)[None, :]
    if current is not None:
        v = tl.load(current + at, mask=inside, other=0.0).to(tl.float32)
        if update is not None:
            # The state is what is stored, rounded: score and mix the same values that later reads will see.
            v += tl.load(update + at, mask=inside, other=0.0).to(tl.float32)
            v = v.to(state.dtype.element_ty).to(tl.float32)
        tl.store(state + at, v.to(state.dtype.element_ty), mask=inside)
        w = tl.load(query + d, mask=d < D, other=0.0)[None, :]
        r = tl.rsqrt(tl.sum(v * v, 1) / D + eps)
        score = r * tl.sum(v * w, 1)
        logit = score
        if bias is not None:
            logit += tl.load(bias + (t // tokens_per_row) * bias_stride, mask=live, other=0.0)
        beta = tl.sigmoid(logit - tl.load(lse + t * lse_stride, mask=live, other=0.0))
        h += beta[:, None] * (v - h)
        tl.store(logits + t, logit, mask=live)
        tl.store(stats + t * 4, r, mask=live)
        tl.store(stats + t * 4 + 1, score, mask=live)
        tl.store(stats + t * 4 + 2, beta, mask=live)
    h_rstd = tl.rsqrt(tl.sum(h * h, 1) / D + norm_eps)
    tl.store(stats + t * 4 + 3, h_rstd, mask=live)
    tl.store(normed + at, (h * h_rstd[:, None] * g).to(normed.dtype.element_ty), mask=inside)


@triton.jit
def merge_backward_kernel(
    state,
    mixed,
    query,
    norm_weight,
    stats,
    d_state,
    d_normed,
    d_logits,
    d_current,
    d_mixed,
    d_lse,
    d_scores,
    d_query,
    d_norm_weight,
    tokens,
    steps,
    programs,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    g = tl.load(norm_weight + d, mask=d < D, other=0.0)[None, :]
    partial_g = tl.zeros((BLOCK_D,), tl.float32)
    partial_w = tl.zeros((BLOCK_D,), tl.float32)
    if state is not None:
        w = tl.load(query + d, mask=d < D, other=0.0)[None, :]
    for step in range(steps):
        t = (program + step * programs) * BLOCK_T + tl.arange(0, BLOCK_T)
        live = t < tokens
        inside = live[:, None] & (d < D)[None, :]
        at = t[:, None] * D + d[None, :]
        m = tl.load(mixed + at, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(d_normed + at, mask=inside, other=0.0).to(tl.float32)
        h_rstd = tl.load(stats + t * 4 + 3, mask=live, other=0.0)[:, None]
        if state is not None:
            v = tl.load(state + at, mask=inside, other=0.0).to(tl.float32)
            if d_state is not None:
                carried = tl.load(d_state + at, mask=inside, other=0.0).to(tl.float32)
            r = tl.load(stats + t * 4, mask=live, other=0.0)
            score = tl.load(stats + t * 4 + 1, mask=live, other=0.0)
            beta = tl.load(stats + t * 4 + 2, mask=live, other=0.0)
            h_hat = (m + beta[:, None] * (v - m)) * h_rstd
        else:
            h_hat = m * h_rstd
        d_hat = dy * g
        dh = (d_hat - h_hat * (tl.sum(d_hat * h_hat, 1) / D)[:, None]) * h_rstd
        partial_g += tl.sum(dy * h_hat, 0)
        if state is not None:
            d_gate = tl.sum((v - m) * dh, 1) * beta * (1.0 - beta)
            tl.store(d_lse + t, -d_gate, mask=live)
            ds = d_gate
            if d_logits is not None:
                ds += tl.load(d_logits + t, mask=live, other=0.0)
            if d_scores is not None:
                tl.store(d_scores + t, ds, mask=live)
            c = ds * r
            dv = beta[:, None] * dh + c[:, None] * w - (c * score * r / D)[:, None] * v
            if d_state is not None:
                dv += carried
            tl.store(d_current + at, dv.to(d_current.dtype.element_ty), mask=inside)
            partial_w += tl.sum(c[:, None] * v, 0)
            dh = dh * (1.0 - beta)[:, None]
        tl.store(d_mixed + at, dh.to(d_mixed.dtype.element_ty), mask=inside)
    tl.store(d_norm_weight + program * D + d, partial_g, mask=d < D)
    if state is not None:
        tl.store(d_query + program * D + d, partial_w, mask=d < D)


def _launch(mixed: Tensor) -> Launch:
    return Launch.over(mixed, elements_per_warp=256)


@torch.library.custom_op("attnres::merge_add", mutates_args=())
def merge_add(
    current: Tensor,
    update: Tensor | None,
    mixed: Tensor,
    lse: Tensor,
    query: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor,
    eps: float,
    norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One read of the running state on top of a prepared mix.

    Args:
        current: old state `[B, T, D]`.
        update: sublayer output `[B, T, D]` in the same dtype, or None.
        mixed: mix over the finished sources `[B, T, D]`.
        lse: log-sum-exp of their logits `[B, T]` fp32; may be one column of a larger tensor.
        query: `w * g`, `[D]` fp32.
        bias: of the state, `[1]` or `[B, 1]` fp32, or None.
        norm_weight: of the output norm, `[D]` fp32.
        eps: of the key norm.
        norm_eps: of the output norm.

    Returns:
        New state `[B, T, D]` (a fresh tensor also without an update, so that its gradient comes back through here)
        and `RMSNorm(h)` `[B, T, D]` in the state's dtype, the state's logit `[B, T]` in fp32, and what the backward
        pass needs of every token. All but the last are differentiable.
    """
    out = _empty_merge(current, update, mixed, lse)
    launch = _launch(mixed)
    if launch.tokens == 0:
        return out
    column = lse.reshape(-1)
    with on_device(mixed):
        merge_forward_kernel[(launch.tiles,)](
            current.contiguous(),
            contiguous(update),
            mixed.contiguous(),
            column,
            column.stride(0),
            query.contiguous(),
            bias,
            bias.stride(0) if bias is not None and bias.ndim == 2 else 0,
            norm_weight.contiguous(),
            *out,
            launch.tokens,
            lse.shape[1],
            eps,
            norm_eps,
            **launch.constants,
        )
    return out


@merge_add.register_fake
def _empty_merge(
    current: Tensor, update: Tensor | None, mixed: Tensor, lse: Tensor, *parameters: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return empty(current), empty(current), lse.new_empty(lse.shape), lse.new_empty((*lse.shape, 4))


@torch.library.custom_op("attnres::merge_add_backward", mutates_args=())
def merge_add_backward(
    state: Tensor,
    mixed: Tensor,
    query: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor,
    stats: Tensor,
    d_state: Tensor | None,
    d_normed: Tensor,
    d_logit: Tensor | None,
    needs_bias: bool,
) -> list[Tensor]:
    """Gradients of the old state (and of the update), mix, lse, query, norm weight, bias (only if `needs_bias`)."""
    d_current, d_mixed, d_lse, d_query, d_norm_weight, *d_bias = out = _empty_gradients(
        state, mixed, query, bias, norm_weight, stats, needs_bias
    )
    launch = _launch(mixed)
    if launch.tokens == 0:
        return [x.zero_() for x in out]
    programs = min(launch.tiles, PROGRAMS)
    partial = d_query.new_empty((2, programs, query.shape[0]))
    d_scores = torch.empty_like(d_lse) if needs_bias else None
    with on_device(mixed):
        merge_backward_kernel[(programs,)](
            state,
            mixed.contiguous(),
            query.contiguous(),
            norm_weight.contiguous(),
            stats,
            contiguous(d_state),
            d_normed.contiguous(),
            contiguous(d_logit),
            d_current,
            d_mixed,
            d_lse,
            d_scores,
            partial[0],
            partial[1],
            launch.tokens,
            triton.cdiv(launch.tiles, programs),
            programs,
            **launch.constants,
        )
    torch.sum(partial[0], 0, out=d_query)
    torch.sum(partial[1], 0, out=d_norm_weight)
    if d_scores is not None and bias is not None:
        d_bias[0].copy_(bias_gradient(d_scores.view(-1, 1), bias, d_lse.shape[0]))
    return out


@merge_add_backward.register_fake
def _empty_gradients(
    state: Tensor,
    mixed: Tensor,
    query: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor,
    stats: Tensor,
    *incoming_and_needs_bias: Any,
) -> list[Tensor]:
    d_lse = stats.new_empty(stats.shape[:-1])
    d_bias = [empty(bias)] if incoming_and_needs_bias[-1] and bias is not None else []
    return [empty(state), empty(mixed), d_lse, empty(query), empty(norm_weight), *d_bias]


def _setup_merge(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, update, mixed, _, query, bias, norm_weight, _, _ = inputs
    state, _, _, stats = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(stats)
    ctx.has_update, ctx.has_bias = update is not None, bias is not None
    ctx.save_for_backward(state, mixed, query, norm_weight, stats, *([] if bias is None else [bias]))


def _backward_merge(
    ctx: Any, d_state: Tensor | None, d_normed: Tensor | None, d_logit: Tensor | None, _: Tensor | None
) -> tuple[Any, ...]:
    state, mixed, query, norm_weight, stats, *bias = ctx.saved_tensors
    needs_bias = ctx.has_bias and ctx.needs_input_grad[5]
    d_current, d_mixed, d_lse, d_query, d_norm_weight, *d_bias = merge_add_backward(
        state,
        mixed,
        query,
        bias[0] if ctx.has_bias else None,
        norm_weight,
        stats,
        d_state,
        torch.zeros_like(state) if d_normed is None else d_normed,
        d_logit,
        needs_bias,
    )
    d_update = d_current if ctx.has_update else None
    return d_current, d_update, d_mixed, d_lse, d_query, d_bias[0] if d_bias else None, d_norm_weight, None, None


merge_add.register_autograd(_backward_merge, setup_context=_setup_merge)


@torch.library.custom_op("attnres::norm", mutates_args=())
def norm(mixed: Tensor, norm_weight: Tensor, norm_eps: float) -> tuple[Tensor, Tensor]:
    """A read without a running state: `RMSNorm(mixed)` `[B, T, D]`, and what the backward pass needs."""
    normed, stats = _empty_norm(mixed)
    launch = _launch(mixed)
    if launch.tokens:
        with on_device(mixed):
            merge_forward_kernel[(launch.tiles,)](
                current=None,
                update=None,
                mixed=mixed.contiguous(),
                lse=None,
                lse_stride=None,
                query=None,
                bias=None,
                bias_stride=None,
                norm_weight=norm_weight.contiguous(),
                state=None,
                normed=normed,
                logits=None,
                stats=stats,
                tokens=launch.tokens,
                tokens_per_row=None,
                eps=None,
                norm_eps=norm_eps,
                **launch.constants,
            )
    return normed, stats


@norm.register_fake
def _empty_norm(mixed: Tensor, *parameters: Any) -> tuple[Tensor, Tensor]:
    return empty(mixed), mixed.new_empty((*mixed.shape[:-1], 4), dtype=torch.float32)


@torch.library.custom_op("attnres::norm_backward", mutates_args=())
def norm_backward(mixed: Tensor, norm_weight: Tensor, stats: Tensor, d_normed: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the mix and of the norm weight."""
    d_mixed, d_norm_weight = _empty_norm_gradients(mixed, norm_weight)
    launch = _launch(mixed)
    if launch.tokens == 0:
        return d_mixed, d_norm_weight.zero_()
    programs = min(launch.tiles, PROGRAMS)
    partial = d_norm_weight.new_empty((programs, norm_weight.shape[0]))
    with on_device(mixed):
        merge_backward_kernel[(programs,)](
            state=None,
            mixed=mixed.contiguous(),
            query=None,
            norm_weight=norm_weight.contiguous(),
            stats=stats,
            d_state=None,
            d_normed=d_normed.contiguous(),
            d_logits=None,
            d_current=None,
            d_mixed=d_mixed,
            d_lse=None,
            d_scores=None,
            d_query=None,
            d_norm_weight=partial,
            tokens=launch.tokens,
            steps=triton.cdiv(launch.tiles, programs),
            programs=programs,
            **launch.constants,
        )
    torch.sum(partial, 0, out=d_norm_weight)
    return d_mixed, d_norm_weight


@norm_backward.register_fake
def _empty_norm_gradients(mixed: Tensor, norm_weight: Tensor, *incoming: Any) -> tuple[Tensor, Tensor]:
    return empty(mixed), empty(norm_weight)


def _setup_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    mixed, norm_weight, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(mixed, norm_weight, output[1])


def _backward_norm(ctx: Any, d_normed: Tensor, _: Tensor) -> tuple[Any, ...]:
    mixed, norm_weight, stats = ctx.saved_tensors
    return *norm_backward(mixed, norm_weight, stats, d_normed), None


norm.register_autograd(_backward_norm, setup_context=_setup_norm)

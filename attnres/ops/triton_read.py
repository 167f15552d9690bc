"""One read over S sources in one launch: softmax, mix, and every gradient. Equations are in `README.md`.

S is exact at compile time: sources come as a tuple of pointers, so a list needs no copy. Up to `RESIDENT_ELEMENTS` the
values stay on chip between scoring and mixing; past that they are read again, from cache.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnres.ops.triton_common import (
    Launch,
    bias_gradient,
    contiguous,
    empty,
    empty_gradients,
    finite_or_zero,
    inverse_or_zero,
    log_or_minus_inf,
    on_device,
    read_gradients,
    rows,
    save_read,
)

RESIDENT_ELEMENTS = 16 * 1024

# Programs of the backward pass. Each walks over tokens and owns one fp32 partial row of the query gradient, so the
# order of its sum follows from the shapes alone: the same on every card and in every run. Eight for each of an H200's
# 132 processors; the rows cost under 5% of the bytes of 32k tokens.
PROGRAMS = 1056


@triton.jit
def values_of(source, tiles, i: tl.constexpr, at, inside, RESIDENT: tl.constexpr):
    # Source i in fp32: the tile on chip, or read again.
    if RESIDENT:
        return tiles[i].to(tl.float32)
    else:
        return tl.load(source + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def read_forward_kernel(
    sources,
    query,
    bias,
    mixed,
    logits,
    lse,
    rstd,
    tokens,
    tokens_per_row,
    bias_stride,
    eps,
    S: tl.constexpr,
    RESIDENT: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.arange(0, BLOCK_D)
    live = t < tokens
    inside = live[:, None] & (d < D)[None, :]
    at = t[:, None] * D + d[None, :]
    w = tl.load(query + d, mask=d < D, other=0.0)[None, :]
    # All loads are issued before the first reduction: a load does not move across its barrier.
    tiles = ()
    if RESIDENT:
        for i in tl.static_range(S):
            tiles = tiles + (tl.load(sources[i] + at, mask=inside, other=0.0),)
    scored = ()
    top = tl.full((BLOCK_T,), float("-inf"), tl.float32)
    for i in tl.static_range(S):
        v = values_of(sources[i], tiles, i, at, inside, RESIDENT)
        dot = tl.sum(v * w, 1)
        r = tl.rsqrt(tl.sum(v * v, 1) / D + eps)
        logit = r * dot
        if bias is not None:
            logit += tl.load(bias + (t // tokens_per_row) * bias_stride + i, mask=live, other=0.0)
        tl.store(rstd + t * S + i, r, mask=live)
        tl.store(logits + t * S + i, logit, mask=live)
        top = tl.maximum(top, logit)
        scored = scored + (logit,)
    top = finite_or_zero(top)
    weights = ()
    total = tl.zeros((BLOCK_T,), tl.float32)
    for i in tl.static_range(S):
        weights = weights + (tl.exp(scored[i] - top),)
        total += weights[i]
    tl.store(lse + t, top + log_or_minus_inf(total), mask=live)
    h = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for i in tl.static_range(S):
        v = values_of(sources[i], tiles, i, at, inside, RESIDENT)
        h += weights[i][:, None] * v
    h *= inverse_or_zero(total)[:, None]
    tl.store(mixed + at, h.to(mixed.dtype.element_ty), mask=inside)


@triton.jit
def read_backward_kernel(
    sources,
    d_sources,
    query,
    bias,
    logits,
    lse,
    rstd,
    d_mixed,
    d_logits,
    d_lse,
    d_scores,
    d_query,
    tokens,
    tokens_per_row,
    bias_stride,
    steps,
    programs,
    S: tl.constexpr,
    RESIDENT: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    w = tl.load(query + d, mask=d < D, other=0.0)[None, :]
    partial = tl.zeros((BLOCK_D,), tl.float32)
    for step in range(steps):
        t = (program + step * programs) * BLOCK_T + tl.arange(0, BLOCK_T)
        live = t < tokens
        inside = live[:, None] & (d < D)[None, :]
        at = t[:, None] * D + d[None, :]
        dh = tl.load(d_mixed + at, mask=inside, other=0.0).to(tl.float32)
        tiles = ()
        if RESIDENT:
            for i in tl.static_range(S):
                tiles = tiles + (tl.load(sources[i] + at, mask=inside, other=0.0),)
        log_total = finite_or_zero(tl.load(lse + t, mask=live, other=0.0))
        weights = ()
        d_weights = ()
        mean = tl.zeros((BLOCK_T,), tl.float32)
        for i in tl.static_range(S):
            v = values_of(sources[i], tiles, i, at, inside, RESIDENT)
            a = tl.exp(tl.load(logits + t * S + i, mask=live, other=float("-inf")) - log_total)
            da = tl.sum(v * dh, 1)
            mean += a * da
            weights = weights + (a,)
            d_weights = d_weights + (da,)
        if d_lse is not None:
            mean -= tl.load(d_lse + t, mask=live, other=0.0)
        d_w = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
        for i in tl.static_range(S):
            v = values_of(sources[i], tiles, i, at, inside, RESIDENT)
            r = tl.load(rstd + t * S + i, mask=live, other=0.0)
            logit = tl.load(logits + t * S + i, mask=live, other=float("-inf"))
            score = finite_or_zero(logit)
            if bias is not None:
                b = tl.load(bias + (t // tokens_per_row) * bias_stride + i, mask=live, other=0.0)
                score -= finite_or_zero(b)
            ds = weights[i] * (d_weights[i] - mean)
            if d_logits is not None:
                # Nothing passes a masked source, whatever its cotangent.
                g = tl.load(d_logits + t * S + i, mask=live, other=0.0)
                ds += tl.where(logit == float("-inf"), 0.0, g)
            if d_scores is not None:
                tl.store(d_scores + t * S + i, ds, mask=live)
            c = ds * r
            dv = weights[i][:, None] * dh + c[:, None] * w - (c * score * r / D)[:, None] * v
            tl.store(d_sources[i] + at, dv.to(d_sources[i].dtype.element_ty), mask=inside)
            d_w += c[:, None] * v
        partial += tl.sum(d_w, 0)
    tl.store(d_query + program * D + d, partial, mask=d < D)


def _launch(sources: list[Tensor]) -> Launch:
    return Launch.over(sources[0], elements_per_warp=256)


def _constants(sources: list[Tensor], launch: Launch) -> dict[str, int]:
    resident = launch.block_d * len(sources) <= RESIDENT_ELEMENTS
    return {"S": len(sources), "RESIDENT": resident} | launch.constants


def _bias_stride(bias: Tensor | None) -> int:
    return bias.shape[-1] if bias is not None and bias.ndim == 2 else 0


@torch.library.custom_op("attnres::read", mutates_args=())
def read(
    sources: list[Tensor], query: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One read.

    Args:
        sources: S tensors `[B, T, D]` of one dtype.
        query: `w * g`, `[D]` fp32.
        bias: `[S]` or `[B, S]` fp32, or None.
        eps: of the key norm.

    Returns:
        Mix `[B, T, D]` in the sources' dtype; logits `[B, T, S]`, their log-sum-exp `[B, T]` and the keys' `rstd`
        `[B, T, S]` in fp32. All but the last are differentiable.
    """
    mixed, logits, lse, rstd = _empty_read(sources)
    launch = _launch(sources)
    if launch.tokens == 0:
        return mixed, logits, lse, rstd
    with on_device(mixed):
        read_forward_kernel[(launch.tiles,)](
            tuple(rows(source) for source in sources),
            query.contiguous(),
            contiguous(bias),
            mixed,
            logits,
            lse,
            rstd,
            launch.tokens,
            mixed.shape[1],
            _bias_stride(bias),
            eps,
            **_constants(sources, launch),
        )
    return mixed, logits, lse, rstd


@read.register_fake
def _empty_read(sources: list[Tensor], *parameters: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, time, _ = sources[0].shape
    mixed = empty(sources[0])
    logits = mixed.new_empty((batch, time, len(sources)), dtype=torch.float32)
    return mixed, logits, logits.new_empty((batch, time)), empty(logits)


@torch.library.custom_op("attnres::read_backward", mutates_args=())
def read_backward(
    sources: list[Tensor],
    query: Tensor,
    bias: Tensor | None,
    logits: Tensor,
    lse: Tensor,
    rstd: Tensor,
    d_mixed: Tensor,
    d_logits: Tensor | None,
    d_lse: Tensor | None,
    needs_bias: bool,
) -> list[Tensor]:
    """Gradients of the query, of the bias (only if `needs_bias`) and of every source."""
    d_query, *d_sources = out = empty_gradients(sources, query, bias, needs_bias)
    launch = _launch(sources)
    if launch.tokens == 0:
        return [x.zero_() for x in out]
    programs = min(launch.tiles, PROGRAMS)
    partial = d_query.new_empty((programs, launch.width))
    d_scores = torch.empty_like(logits) if needs_bias else None
    with on_device(d_mixed):
        read_backward_kernel[(programs,)](
            tuple(rows(source) for source in sources),
            tuple(d_sources[needs_bias:]),
            query.contiguous(),
            contiguous(bias),
            logits,
            lse,
            rstd,
            d_mixed.contiguous(),
            contiguous(d_logits),
            contiguous(d_lse),
            d_scores,
            partial,
            launch.tokens,
            logits.shape[1],
            _bias_stride(bias),
            triton.cdiv(launch.tiles, programs),
            programs,
            **_constants(sources, launch),
        )
    torch.sum(partial, 0, out=d_query)
    if d_scores is not None and bias is not None:
        out[1].copy_(bias_gradient(d_scores.flatten(0, 1), bias, logits.shape[0]))
    return out


read_backward.register_fake(empty_gradients)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, logits, lse, rstd = output
    save_read(ctx, inputs, logits, lse, rstd)


def _backward(
    ctx: Any, d_mixed: Tensor | None, d_logits: Tensor | None, d_lse: Tensor | None, _: Tensor | None
) -> tuple[Any, ...]:
    return read_gradients(ctx, read_backward, d_mixed, d_logits, d_lse)


read.register_autograd(_backward, setup_context=_setup)

"""n finished sources x M reads in one launch, forward and backward. Equations are in `README.md`.

The sources of a token are held as one packed tile `[T, D, n]`, so one reduction serves all of them: M + 1 barriers
instead of n (M + 1). The backward pass reads every source and every incoming gradient once, and writes each source's
gradient once.
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
    pack,
    read_gradients,
    rows,
    save_read,
    store_row,
    unpack,
)

# The packed tile: at most 8 sources, and 8 x 1024 fp32 elements, 32 registers a thread at 8 warps.
TILE_SOURCES = 8
TILE_ELEMENTS = 8 * 1024

# Queries of one launch at width 1024, beside a packed tile with room to spare and beside a full one: the most at which
# the backward pass compiles without spills. By compute capability; the last entry is for all others.
QUERIES = {9: (9, 6), None: (5, 4)}

# Programs of the backward pass, four waves of an H200's 132 processors: see `triton_read.PROGRAMS`. The partial rows
# of 8 queries cost 2% of the bytes of 32k tokens.
PROGRAMS = 528


@triton.jit
def block_forward_kernel(
    sources,
    mixed,
    queries,
    bias,
    logits,
    lse,
    rstd,
    tokens,
    tokens_per_row,
    bias_stride,
    eps,
    N: tl.constexpr,
    M: tl.constexpr,
    WIDTH: tl.constexpr,
    LEVELS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.arange(0, BLOCK_D)
    i = tl.arange(0, WIDTH)
    live = t < tokens
    inside = live[:, None] & (d < D)[None, :]
    at = t[:, None] * D + d[None, :]
    real = live[:, None] & (i < N)[None, :]
    tiles = ()
    for k in tl.static_range(N):
        tiles = tiles + (tl.load(sources[k] + at, mask=inside, other=0.0).to(tl.float32),)
    for _ in tl.static_range(WIDTH - N):
        tiles = tiles + (tl.zeros((BLOCK_T, BLOCK_D), tl.float32),)
    v = pack(tiles, BLOCK_T, BLOCK_D, WIDTH, LEVELS)
    r = tl.rsqrt(tl.sum(v * v, 1) / D + eps)
    store_row(rstd, t, r, live, N, BLOCK_T, WIDTH, LEVELS)
    bias_row = (t // tokens_per_row)[:, None] * bias_stride + i[None, :]
    for j in tl.static_range(M):
        w = tl.load(queries + j * D + d, mask=d < D, other=0.0)
        logit = r * tl.sum(v * w[None, :, None], 1)
        if bias is not None:
            logit += tl.load(bias + bias_row + j * N, mask=real, other=0.0)
        logit = tl.where((i < N)[None, :], logit, float("-inf"))
        store_row(logits, t * M + j, logit, live, N, BLOCK_T, WIDTH, LEVELS)
        top = finite_or_zero(tl.max(logit, 1))
        a = tl.exp(logit - top[:, None])
        total = tl.sum(a, 1)
        tl.store(lse + t * M + j, top + log_or_minus_inf(total), mask=live)
        a = a * inverse_or_zero(total)[:, None]
        h = tl.sum(v * a[:, None, :], 2)
        tl.store(mixed[j] + at, h.to(mixed[j].dtype.element_ty), mask=inside)


@triton.jit
def block_backward_kernel(
    sources,
    d_sources,
    d_mixed,
    queries,
    logits,
    lse,
    rstd,
    d_logits,
    d_lse,
    d_scores,
    d_queries,
    tokens,
    steps,
    programs,
    N: tl.constexpr,
    M: tl.constexpr,
    WIDTH: tl.constexpr,
    LEVELS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    i = tl.arange(0, WIDTH)
    partials = ()
    for _ in tl.static_range(M):
        partials = partials + (tl.zeros((BLOCK_D,), tl.float32),)
    for step in range(steps):
        t = (program + step * programs) * BLOCK_T + tl.arange(0, BLOCK_T)
        live = t < tokens
        inside = live[:, None] & (d < D)[None, :]
        at = t[:, None] * D + d[None, :]
        real = live[:, None] & (i < N)[None, :]
        # All loads are issued before the first reduction: a load does not move across its barrier.
        raw = ()
        for k in tl.static_range(N):
            raw = raw + (tl.load(sources[k] + at, mask=inside, other=0.0),)
        incoming = ()
        for j in tl.static_range(M):
            incoming = incoming + (tl.load(d_mixed[j] + at, mask=inside, other=0.0),)
        tiles = ()
        for k in tl.static_range(N):
            tiles = tiles + (raw[k].to(tl.float32),)
        for _ in tl.static_range(WIDTH - N):
            tiles = tiles + (tl.zeros((BLOCK_T, BLOCK_D), tl.float32),)
        v = pack(tiles, BLOCK_T, BLOCK_D, WIDTH, LEVELS)
        r = tl.load(rstd + t[:, None] * N + i[None, :], mask=real, other=0.0)
        dv = tl.zeros((BLOCK_T, BLOCK_D, WIDTH), tl.float32)
        through_mix = tl.zeros((BLOCK_T, WIDTH), tl.float32)
        updated = ()
        for j in tl.static_range(M):
            row = (t * M + j)[:, None] * N + i[None, :]
            logit = tl.load(logits + row, mask=real, other=float("-inf"))
            log_total = finite_or_zero(tl.load(lse + t * M + j, mask=live, other=0.0))
            a = tl.exp(logit - log_total[:, None])
            dh = incoming[j].to(tl.float32)
            da = tl.sum(v * dh[:, :, None], 1)
            through_mix += a * da
            mean = tl.sum(a * da, 1)
            if d_lse is not None:
                mean -= tl.load(d_lse + t * M + j, mask=live, other=0.0)
            ds = a * (da - mean[:, None])
            if d_logits is not None:
                # Nothing passes a masked source, whatever its cotangent.
                g = tl.load(d_logits + row, mask=real, other=0.0)
                ds += tl.where(logit == float("-inf"), 0.0, g)
            if d_scores is not None:
                store_row(d_scores, t * M + j, ds, live, N, BLOCK_T, WIDTH, LEVELS)
            c = ds * r
            w = tl.load(queries + j * D + d, mask=d < D, other=0.0)
            dv += a[:, None, :] * dh[:, :, None] + c[:, None, :] * w[None, :, None]
            updated = updated + (partials[j] + tl.sum(tl.sum(v * c[:, None, :], 2), 0),)
        partials = updated
        # sum_d v (c w) for the norm: what v dv holds beyond the mix. One reduction in place of M scores read back.
        through_norm = (tl.sum(v * dv, 1) - through_mix) * (r * r / D)
        dv -= v * through_norm[:, None, :]
        out = unpack(dv, BLOCK_T, BLOCK_D, WIDTH, LEVELS)
        for k in tl.static_range(N):
            tl.store(d_sources[k] + at, out[k].to(d_sources[k].dtype.element_ty), mask=inside)
    for j in tl.static_range(M):
        tl.store(d_queries + (program * M + j) * D + d, partials[j], mask=d < D)


def fits(num_sources: int, width: int) -> bool:
    """Whether the packed tile of so many sources stays on chip; else a read at a time is faster."""
    elements = triton.next_power_of_2(num_sources) * triton.next_power_of_2(width)
    return num_sources <= TILE_SOURCES and elements <= TILE_ELEMENTS


def max_queries(num_sources: int, width: int, device: torch.device) -> int:
    """The most queries of one launch whose backward pass does not spill."""
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9
    block_d = triton.next_power_of_2(width)
    spare, full = QUERIES.get(major, QUERIES[None])
    # A width that is no power of two costs registers for its masks.
    roomy = width == block_d and num_sources * block_d < TILE_ELEMENTS
    return max(1, (spare if roomy else full) * 1024 // max(block_d, 1024))


def _constants(sources: list[Tensor], queries: Tensor, launch: Launch) -> dict[str, int]:
    packed = triton.next_power_of_2(len(sources))
    counts = {"N": len(sources), "M": queries.shape[0], "WIDTH": packed, "LEVELS": packed.bit_length() - 1}
    return counts | launch.constants


def _launch(sources: list[Tensor]) -> Launch:
    return Launch.over(sources[0], elements_per_warp=128)


def _bias_stride(bias: Tensor | None) -> int:
    return bias.shape[-1] * bias.shape[-2] if bias is not None and bias.ndim == 3 else 0


@torch.library.custom_op("attnres::read_block", mutates_args=())
def read_block(sources: list[Tensor], queries: Tensor, bias: Tensor | None, eps: float) -> list[Tensor]:
    """M reads over the same n sources.

    Args:
        sources: n tensors `[B, T, D]` of one dtype.
        queries: `w * g` of every read, `[M, D]` fp32.
        bias: `[M, n]` or `[B, M, n]` fp32, or None.
        eps: of the key norm.

    Returns:
        Logits `[B, T, M, n]`, their log-sum-exp `[B, T, M]` and the keys' `rstd` `[B, T, n]` in fp32, then M mixes
        `[B, T, D]` in the sources' dtype. All but `rstd` are differentiable.
    """
    out = _empty_block(sources, queries)
    logits, lse, rstd, *mixed = out
    launch = _launch(sources)
    if launch.tokens == 0:
        return out
    with on_device(lse):
        block_forward_kernel[(launch.tiles,)](
            tuple(rows(source) for source in sources),
            tuple(mixed),
            queries.contiguous(),
            contiguous(bias),
            logits,
            lse,
            rstd,
            launch.tokens,
            lse.shape[1],
            _bias_stride(bias),
            eps,
            **_constants(sources, queries, launch),
        )
    return out


@read_block.register_fake
def _empty_block(sources: list[Tensor], queries: Tensor, *parameters: Any) -> list[Tensor]:
    (batch, time, _), n, m = sources[0].shape, len(sources), queries.shape[0]
    lse = sources[0].new_empty((batch, time, m), dtype=torch.float32)
    mixed = [empty(sources[0]) for _ in range(m)]
    return [lse.new_empty((batch, time, m, n)), lse, lse.new_empty((batch, time, n)), *mixed]


@torch.library.custom_op("attnres::read_block_backward", mutates_args=())
def read_block_backward(
    sources: list[Tensor],
    queries: Tensor,
    bias: Tensor | None,
    logits: Tensor,
    lse: Tensor,
    rstd: Tensor,
    d_mixed: list[Tensor],
    d_logits: Tensor | None,
    d_lse: Tensor | None,
    needs_bias: bool,
) -> list[Tensor]:
    """Gradients of the queries, of the bias (only if `needs_bias`) and of every source."""
    d_queries, *_ = out = empty_gradients(sources, queries, bias, needs_bias)
    launch = _launch(sources)
    if launch.tokens == 0:
        return [x.zero_() for x in out]
    programs = min(launch.tiles, PROGRAMS)
    partial = d_queries.new_empty((programs, *queries.shape))
    d_scores = torch.empty_like(logits) if needs_bias else None
    with on_device(lse):
        block_backward_kernel[(programs,)](
            tuple(rows(source) for source in sources),
            tuple(out[1 + needs_bias :]),
            tuple(rows(d) for d in d_mixed),
            queries.contiguous(),
            logits,
            lse,
            rstd,
            contiguous(d_logits),
            contiguous(d_lse),
            d_scores,
            partial,
            launch.tokens,
            triton.cdiv(launch.tiles, programs),
            programs,
            **_constants(sources, queries, launch),
        )
    torch.sum(partial, 0, out=d_queries)
    if d_scores is not None and bias is not None:
        out[1].copy_(bias_gradient(d_scores.flatten(0, 1), bias, lse.shape[0]))
    return out


read_block_backward.register_fake(empty_gradients)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    logits, lse, rstd, *_ = output
    save_read(ctx, inputs, logits, lse, rstd)


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    d_logits, d_lse, _, *d_mixed = grads
    return read_gradients(ctx, read_block_backward, d_mixed, d_logits, d_lse)


read_block.register_autograd(_backward, setup_context=_setup)

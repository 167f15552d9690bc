"""What the Triton kernels share: packed tiles, launch shapes, checks on the host."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Tokens per program under the interpreter, which runs programs one after another but vectorises inside one.
INTERPRETED_TOKENS = 32


@triton.jit
def pack(tiles, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, WIDTH: tl.constexpr, LEVELS: tl.constexpr):
    # WIDTH = 2**LEVELS tiles [T, D] -> [T, D, WIDTH], the last axis within a thread: one reduction serves all tiles.
    level = tiles
    for k in tl.static_range(LEVELS):
        joined = ()
        for i in tl.static_range(WIDTH >> (k + 1)):
            joined = joined + (tl.join(level[i], level[i + (WIDTH >> (k + 1))]),)
        level = joined
    return tl.reshape(level[0], (BLOCK_T, BLOCK_D, WIDTH))


@triton.jit
def unpack(packed, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, WIDTH: tl.constexpr, LEVELS: tl.constexpr):
    # [T, D, WIDTH] -> WIDTH tiles [T, D]; the inverse of pack.
    level = (packed,)
    for k in tl.static_range(LEVELS):
        low = ()
        high = ()
        for i in tl.static_range(1 << k):
            halves = tl.split(tl.reshape(level[i], (BLOCK_T, BLOCK_D, WIDTH >> (k + 1), 2)))
            low = low + (halves[0],)
            high = high + (halves[1],)
        level = low + high
    tiles = ()
    for i in tl.static_range(WIDTH):
        tiles = tiles + (tl.reshape(level[i], (BLOCK_T, BLOCK_D)),)
    return tiles


@triton.jit
def store_row(
    base,
    row,
    values,
    live,
    N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    WIDTH: tl.constexpr,
    LEVELS: tl.constexpr,
):
    # base[row, :N] = values [T, WIDTH]. Every thread holds all values: stored one by one they need no exchange, stored
    # as a row they would pass through shared memory and two barriers.
    parts = unpack(tl.expand_dims(values, 1), BLOCK_T, 1, WIDTH, LEVELS)
    for k in tl.static_range(N):
        tl.store(base + (row * N + k)[:, None], parts[k], mask=live[:, None])


@triton.jit
def finite_or_zero(x):
    # A log-sum-exp over masked sources only is -inf; subtracting zero instead leaves exp(-inf) = 0 and no NaN.
    return tl.where(x == float("-inf"), 0.0, x)


@triton.jit
def log_or_minus_inf(x):
    return tl.where(x > 0.0, tl.log(tl.where(x > 0.0, x, 1.0)), float("-inf"))


@triton.jit
def inverse_or_zero(x):
    return tl.where(x > 0.0, 1.0 / tl.where(x > 0.0, x, 1.0), 0.0)


@dataclass(frozen=True)
class Launch:
    """Shape of a launch: what it covers, compile-time tile sizes and warps.

    Attributes:
        tokens: N, rows of the tensors.
        width: D, elements of a row.
        block_t: tokens per tile.
        block_d: width of a tile, a power of two.
        warps: warps per program.
    """

    tokens: int
    width: int
    block_t: int
    block_d: int
    warps: int

    @classmethod
    def over(cls, like: Tensor, elements_per_warp: int) -> "Launch":
        """Over the rows of a tensor `[..., D]`; one warp takes so many elements of a row."""
        width = like.shape[-1]
        tokens, block_d = like.numel() // width, triton.next_power_of_2(width)
        block_t = min(INTERPRETED_TOKENS, triton.next_power_of_2(max(tokens, 1))) if interpreted() else 1
        return cls(tokens, width, block_t, block_d, max(1, min(16, block_d // elements_per_warp)))

    @property
    def tiles(self) -> int:
        """Tiles that cover the tokens."""
        return triton.cdiv(self.tokens, self.block_t)

    @property
    def constants(self) -> dict[str, int]:
        """The keyword arguments that every kernel takes."""
        return {"D": self.width, "BLOCK_D": self.block_d, "BLOCK_T": self.block_t, "num_warps": self.warps}


def interpreted() -> bool:
    """Whether Triton runs kernels on the CPU (`TRITON_INTERPRET=1` when it was imported)."""
    return not isinstance(pack, triton.JITFunction)


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device: make it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def rows(tensor: Tensor) -> Tensor:
    """`[..., D] -> [N, D]`, contiguous, as the kernels address it: a copy only of what is not contiguous."""
    return tensor.contiguous().view(-1, tensor.shape[-1])


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """The tensor as the kernels address it, where there is one."""
    return None if tensor is None else tensor.contiguous()


def empty(like: Tensor) -> Tensor:
    """A contiguous tensor of the shape of another, to be written by a kernel."""
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def empty_gradients(
    sources: list[Tensor], query: Tensor, bias: Tensor | None, *saved_and_incoming: Any
) -> list[Tensor]:
    """What the backward passes of reads over sources return, unwritten; takes their arguments.

    The last argument, `needs_bias`, says whether the gradient of the bias is among them.
    """
    biases = [bias] if saved_and_incoming[-1] and bias is not None else []
    return [empty(x) for x in (query, *biases, *sources)]


def save_read(ctx: Any, inputs: tuple[Any, ...], logits: Tensor, lse: Tensor, rstd: Tensor) -> None:
    """What the backward pass of reads over sources needs of the forward pass: for `read_gradients`."""
    sources, query, bias, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(rstd)
    ctx.has_bias = bias is not None
    ctx.save_for_backward(query, *([] if bias is None else [bias]), logits, lse, rstd, *sources)


def read_gradients(
    ctx: Any, backward: Callable[..., list[Tensor]], d_mixed: Any, d_logits: Tensor | None, d_lse: Tensor | None
) -> tuple[Any, ...]:
    """Gradients of the inputs of reads over sources, from their `backward` op.

    `d_mixed` is of one mix, or a list of those of several; None stands for zero.
    """
    # Once: a recomputed tensor can be unpacked one time only.
    saved = list(ctx.saved_tensors)
    query, bias = saved.pop(0), saved.pop(0) if ctx.has_bias else None
    logits, lse, rstd, *sources = saved
    needs_bias = ctx.has_bias and ctx.needs_input_grad[2]

    def or_zero(gradient: Tensor | None) -> Tensor:
        return torch.zeros_like(sources[0]) if gradient is None else gradient

    given = [or_zero(d) for d in d_mixed] if isinstance(d_mixed, list) else or_zero(d_mixed)
    out = backward(sources, query, bias, logits, lse, rstd, given, d_logits, d_lse, needs_bias)
    d_query, *rest = out
    d_bias = rest.pop(0) if needs_bias else None
    return rest, d_query, d_bias, None


def bias_gradient(d_scores: Tensor, bias: Tensor, batch: int) -> Tensor:
    """Sum of per-token gradients `[N, ...]` to the shape of a bias `[...]` or `[batch, ...]`, in a fixed order."""
    per_row = bias.ndim == d_scores.ndim
    return d_scores.unflatten(0, (batch, -1)).sum(1) if per_row else d_scores.sum(0)

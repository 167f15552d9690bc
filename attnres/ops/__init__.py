"""The read: softmax over depth sources, and their mix.

`depth_mix` is the read as the paper writes it, for users. The model calls the block-wise form of the same equations,
`prepare_block` (all reads of a block against the finished sources) and `merge` (one read against the running state).
One selector, `backend`, serves all three.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from attnres.ops import batched
from attnres.ops.batched import Merged, PreparedBlock, ReadParameters

__all__ = [
    "Merged",
    "PreparedBlock",
    "ReadParameters",
    "current_logit",
    "depth_mix",
    "log_weights",
    "merge",
    "mix",
    "mix_and_norm",
    "prepare_block",
]

BACKENDS = ("auto", "torch", "triton")


def _select(backend: str, like: Tensor) -> ModuleType:
    """The module that runs a read: the only place where a backend is chosen."""
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, received {backend!r}")
    if backend == "torch" or (backend == "auto" and not like.is_cuda):
        return batched
    try:
        from attnres.ops import triton_backend
    except ModuleNotFoundError as missing:
        if backend == "auto":
            return batched
        raise ValueError(f"backend: 'triton' needs the package {missing.name}; install it or use 'torch'") from missing
    refusal = triton_backend.refusal(like)
    if refusal is None:
        return triton_backend
    if backend == "auto":
        return batched
    raise ValueError(f"{refusal}; use backend='torch', or 'auto', which takes the torch path here")


def _full_precision(like: Tensor) -> AbstractContextManager[None]:
    """Autocast switched off: a read computes in fp32 inside, whatever surrounds it."""
    device = like.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _check(sources: Sequence[Tensor], reads: Sequence[ReadParameters], num_sources: int) -> None:
    if not sources:
        raise ValueError("sources: expected at least one tensor [B, T, D], received none")
    first = sources[0]
    if first.ndim != 3:
        raise ValueError(f"sources: expected tensors [B, T, D], received shape {tuple(first.shape)}; add a batch axis")
    for index, source in enumerate(sources):
        if source.shape != first.shape or source.dtype != first.dtype:
            raise ValueError(
                f"sources[{index}]: expected {tuple(first.shape)} {first.dtype} like sources[0], "
                f"received {tuple(source.shape)} {source.dtype}"
            )
    batch, _, width = first.shape
    for read in reads:
        for name, vector in (("query", read.query), ("key_weight", read.key_weight)):
            if vector.shape != (width,):
                raise ValueError(f"{name}: expected shape ({width},), received {tuple(vector.shape)}")
        if read.bias is not None and read.bias.shape not in ((num_sources,), (batch, num_sources)):
            raise ValueError(
                f"bias: expected shape ({num_sources},) or ({batch}, {num_sources}), received {tuple(read.bias.shape)}"
            )


def depth_mix(
    sources: Sequence[Tensor],
    query: Tensor,
    key_weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """One read: softmax over depth sources and their mix (Attention Residuals, arXiv 2603.15031).

    The equations are those of `attnres.ops.reference.depth_mix`.

    Args:
        sources: S tensors `[B, T, D]` of one dtype, oldest first; mixed as they are, not normalised.
        query: `[D]`.
        key_weight: `[D]`, weight of the RMS norm on the keys.
        bias: `[S]`, or `[B, S]` so that rows of a batch can differ; `-inf` removes a source. None is zero.
        eps: added to the mean square of a source.
        backend: `"auto"`, `"torch"` or `"triton"`.

    Returns:
        The mix `[B, T, D]` in the sources' dtype, and the routing weights `[B, T, S]` in fp32, both differentiable.

    Raises:
        ValueError: where shapes or dtypes disagree, or a row's bias removes every source.
    """
    read = ReadParameters(query, key_weight, bias)
    _check(sources, [read], len(sources))
    if bias is not None and not torch.compiler.is_compiling() and bool(torch.isneginf(bias).all(-1).any()):
        raise ValueError("bias: a row removes every source (-inf throughout); leave at least one finite entry")
    with _full_precision(sources[0]):
        block = _select(backend, sources[0]).prepare_block(sources, [read], eps)
    weights = torch.softmax(block.logits[..., 0, :], dim=-1)
    return block.mixed[0].to(sources[0].dtype), weights


def prepare_block(
    sources: Sequence[Tensor], reads: Sequence[ReadParameters], eps: float = 1e-6, backend: str = "auto"
) -> PreparedBlock:
    """Score and mix the finished sources for all M reads of a block at once.

    Args:
        sources: n finished sources `[B, T, D]`, oldest first.
        reads: parameters of the M reads; a read that will also see the running state has a bias of n + 1 entries,
            of which the last is left to `merge`.
        eps: added to the mean square of a source.
        backend: as in `depth_mix`.
    """
    with _full_precision(sources[0]):
        return _select(backend, sources[0]).prepare_block(sources, reads, eps)


def merge(
    block: PreparedBlock,
    index: int,
    current: Tensor | None,
    update: Tensor | None,
    read: ReadParameters,
    norm_weight: Tensor,
    eps: float = 1e-6,
    norm_eps: float = 1e-6,
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> Merged:
    """Finish read `index` of a block: add the pending sublayer output, merge the running state, normalise.

    Args:
        block: from `prepare_block`.
        index: which of the block's reads this is.
        current: running state `[B, T, D]`, or None while it is empty.
        update: output of the last sublayer `[B, T, D]`, not yet added to `current`, or None.
        read: the parameters given to `prepare_block` at `index`.
        norm_weight: `[D]`, weight of the sublayer's input RMS norm.
        eps: of the key norm.
        norm_eps: of the sublayer's input norm.
        dtype: of the normed output where there is no running state to take it from.
        backend: as in `depth_mix`.
    """
    mixed = block.mixed[index]
    run = _select(backend, mixed)
    if current is None:
        # The first output of a block is the running state.
        current, update = update, None
    with _full_precision(mixed):
        if current is None:
            return Merged(None, run.rms_norm(mixed, norm_weight, norm_eps).to(dtype), None)
        return run.merge(block, index, current, update, read, norm_weight, eps, norm_eps)


def log_weights(block: PreparedBlock, index: int, logit: Tensor | None) -> Tensor:
    """Log routing weights `[B, T, S]` of one read, fp32, differentiable, without another pass over the sources.

    Args:
        block: from `prepare_block`.
        index: which of the block's reads.
        logit: of the running state, from `Merged.logit` or `current_logit`; None where it is empty.
    """
    logits, lse = block.logits[..., index, :], block.lse[..., index]
    if logit is None:
        return logits - lse.unsqueeze(-1)
    # Log-sum-exp with the running state by elementwise operations, the larger term taken out first: the weight of a
    # source that holds nearly everything stays exact, and no reduction runs over a handful of sources.
    largest = torch.maximum(lse, logit)
    log_sum = F.softplus(-(lse - logit).abs()).unsqueeze(-1)
    return torch.cat([logits, logit.unsqueeze(-1)], dim=-1) - largest.unsqueeze(-1) - log_sum


def current_logit(current: Tensor, read: ReadParameters, eps: float = 1e-6) -> Tensor:
    """Logit `[B, T]` of the running state `current [B, T, D]`, whose bias is the last entry; fp32 (fp64)."""
    with _full_precision(current):
        return batched.current_logit(current, read, eps)


def mix(sources: Sequence[Tensor], weights: Tensor) -> Tensor:
    """`sum_i a_i v_i` for given weights `[B, T, S]`, in their dtype; `[B, T, D]`."""
    total = sources[0].to(weights.dtype) * weights[..., 0:1]
    for index, source in enumerate(sources[1:], start=1):
        total.addcmul_(source.to(weights.dtype), weights[..., index : index + 1])
    return total


def mix_and_norm(sources: Sequence[Tensor], weights: Tensor, norm_weight: Tensor, norm_eps: float = 1e-6) -> Tensor:
    """`RMSNorm(sum_i a_i v_i)` for given weights `[B, T, S]`, in fp32; `[B, T, D]` in the sources' dtype."""
    return batched.rms_norm(mix(sources, weights), norm_weight, norm_eps).to(sources[0].dtype)

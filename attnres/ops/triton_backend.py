"""The read in fused Triton kernels: the same block-wise form as `batched.py`, two-phase, deterministic.

`prepare_block` runs `read_block` (or `read`, for one query or more sources than stay on chip), `merge` runs `merge_add`
or `norm`. Unlike `batched.py`, `PreparedBlock.mixed` is in the sources' dtype: 2 bytes an element move instead of 4.
Arithmetic is fp32 throughout.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from attnres.ops.batched import Merged, PreparedBlock, ReadParameters
from attnres.ops.triton_block import fits, max_queries, read_block
from attnres.ops.triton_common import interpreted
from attnres.ops.triton_merge import merge_add, norm
from attnres.ops.triton_read import read

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def refusal(like: Tensor) -> str | None:
    """Why the kernels cannot run on tensors like this one `[B, T, D]`, with the remedy; None if they can."""
    if like.shape[-1] % 8:
        return f"sources: the Triton kernels expect a width divisible by 8, received {like.shape[-1]}"
    if like.dtype not in DTYPES:
        return f"sources: the Triton kernels expect float32, bfloat16 or float16, received {like.dtype}"
    if not like.is_cuda and not interpreted():
        return f"sources: the Triton kernels expect a CUDA device or TRITON_INTERPRET=1, received {like.device}"
    return None


def _folded(read: ReadParameters) -> Tensor:
    return read.query.float() * read.key_weight.float()


def _bias(reads: Sequence[ReadParameters], n: int, batch: int) -> Tensor | None:
    """The biases of the finished sources, `[M, n]` or `[B, M, n]`; None if no read has one."""
    if all(read.bias is None for read in reads):
        return None
    zeros = reads[0].query.new_zeros(n, dtype=torch.float32)
    rows = [zeros if read.bias is None else read.bias[..., :n].float() for read in reads]
    if any(row.ndim == 2 for row in rows):
        rows = [row.expand(batch, n) for row in rows]
    return torch.stack(rows, dim=-2)


def prepare_block(sources: Sequence[Tensor], reads: Sequence[ReadParameters], eps: float) -> PreparedBlock:
    """Triton backend of `attnres.ops.prepare_block`."""
    sources, n, (batch, _, width) = list(sources), len(sources), sources[0].shape
    if len(reads) == 1 or not fits(n, width):
        blocks = []
        for one in reads:
            bias = _bias([one], n, batch)
            mixed, logits, lse, _ = read(sources, _folded(one), None if bias is None else bias.squeeze(-2), eps)
            blocks.append(PreparedBlock((mixed,), logits.unsqueeze(-2), lse.unsqueeze(-1)))
        return _joined(blocks)
    # Launches of even size, so that none of them reads the sources for one query alone.
    launches = -(-len(reads) // max_queries(n, width, sources[0].device))
    blocks = []
    for k in range(launches):
        some = reads[k * len(reads) // launches : (k + 1) * len(reads) // launches]
        queries = torch.stack([_folded(one) for one in some])
        logits, lse, _, *mixes = read_block(sources, queries, _bias(some, n, batch), eps)
        blocks.append(PreparedBlock(tuple(mixes), logits, lse))
    return _joined(blocks)


def _joined(blocks: Sequence[PreparedBlock]) -> PreparedBlock:
    if len(blocks) == 1:
        return blocks[0]
    mixed = tuple(mix for block in blocks for mix in block.mixed)
    logits = torch.cat([block.logits for block in blocks], dim=-2)
    return PreparedBlock(mixed, logits, torch.cat([block.lse for block in blocks], dim=-1))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x * rstd(x) * weight` in the dtype of x."""
    return norm(x, weight.float(), eps)[0]


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
    """Triton backend of `attnres.ops.merge` where there is a running state."""
    mixed = block.mixed[index]
    if update is not None and update.dtype != current.dtype:
        common = torch.promote_types(current.dtype, update.dtype)
        current, update = current.to(common), update.to(common)
    n = block.logits.shape[-1]
    bias = None if read.bias is None else read.bias[..., n:].float()
    state, normed, logit, _ = merge_add(
        current, update, mixed, block.lse[..., index], _folded(read), bias, norm_weight.float(), eps, norm_eps
    )
    return Merged(state, normed, logit)

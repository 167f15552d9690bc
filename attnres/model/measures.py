"""Measures of a read that training logs and the probe tests: one formula each."""

import torch
from torch import Tensor


def norm_share(part: Tensor, mix: Tensor) -> Tensor:
    """Norm-aware share of a part of a mix, `<part, h> / |h|^2`: over parts that sum to h, the shares sum to 1.

    Args:
        part: `[..., D]`, the weighted sum of some sources.
        mix: `[..., D]`, h.

    Returns:
        `[...]`; 0 where h is zero.
    """
    size = mix.square().sum(-1).clamp(min=torch.finfo(mix.dtype).tiny)
    return (part * mix).sum(-1) / size

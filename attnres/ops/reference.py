"""The read in fp32, written for the eye: the truth that every faster path is tested against."""

from collections.abc import Sequence

import torch
from torch import Tensor


def depth_mix(
    sources: Sequence[Tensor], query: Tensor, key_weight: Tensor, bias: Tensor | None = None, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    r"""Softmax-and-mix over depth sources (Attention Residuals, arXiv 2603.15031).

    .. math::
        r_i = (\mathrm{mean}_d\, v_{i,d}^2 + \epsilon)^{-1/2}, \quad
        \ell_i = r_i \sum_d w_d g_d v_{i,d} + b_i, \quad
        a = \mathrm{softmax}(\ell), \quad h = \sum_i a_i v_i

    Computed in fp32 (fp64 for fp64 sources); the mix is cast back to the sources' dtype once.

    The arguments are those of `attnres.ops.depth_mix`: `query` is `w`, `key_weight` is `g`.

    Returns:
        The mix `[B, T, D]` and the routing weights `[B, T, S]` (fp32, differentiable).
    """
    exact = torch.promote_types(sources[0].dtype, torch.float32)
    values = torch.stack([source.to(exact) for source in sources], dim=-2)
    rms = torch.rsqrt(values.square().mean(-1) + eps)
    logits = rms * (values @ (query.to(exact) * key_weight.to(exact)))
    if bias is not None:
        logits = logits + (bias if bias.ndim == 1 else bias[:, None, :]).to(exact)
    weights = torch.softmax(logits, dim=-1)
    mixed = (weights.unsqueeze(-1) * values).sum(-2)
    return mixed.to(sources[0].dtype), weights

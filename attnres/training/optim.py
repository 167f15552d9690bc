"""The optimizer and its schedule: AdamW in groups with and without decay, warm-up and cosine."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from attnres.model.routing import is_query
from attnres.training.config import OptimConfig


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices and embeddings with decay; norms, biases, routing queries, vectors without.

    Parameters with `requires_grad=False` are in neither; a tied parameter is in one group once.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        # A query is a matrix [1, D] by storage and a vector by meaning.
        (plain if parameter.ndim < 2 or is_query(name) else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, config: OptimConfig, device: torch.device) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`; fused where the device has it.

    Raises:
        ValueError: a trained parameter is not fp32. Lower precision comes from autocast only: in bf16,
        weights near 1
            never move and neither do Adam's moments.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            raise ValueError(f"{name}: expected fp32 master weights, got {parameter.dtype}; load with dtype=float32")
    return torch.optim.AdamW(
        parameter_groups(model, config.weight_decay),
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=device.type in ("cpu", "cuda"),
    )


def lr_multiplier(config: OptimConfig, max_steps: int) -> Callable[[int], float]:
    """The factor on `lr` for the optimizer step with 0-based index `step`.

    Linear from 1/warmup to 1 over the warm-up; then `r + (1-r) (1 + cos(pi x)) / 2`, where x runs from 0 at
    the first step after the warm-up to 1 at the last step, so that the last step uses exactly `r =
    min_lr_ratio`.
    """

    def multiplier(step: int) -> float:
        if step < config.warmup_steps:
            return (step + 1) / config.warmup_steps
        span = max_steps - 1 - config.warmup_steps
        progress = min(1.0, (step - config.warmup_steps) / span) if span > 0 else 1.0
        return config.min_lr_ratio + (1 - config.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))

    return multiplier

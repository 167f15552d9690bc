"""The optimizer: AdamW over parameters with and without weight decay. Its schedule is in `learning_rate.py`."""

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
        ValueError: a trained parameter is not fp32. Lower precision comes from autocast only: in bf16, steps of usual
            size round to nothing on weights near 1 and on Adam's moments.
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

"""How much arithmetic a token costs, and how much a GPU could do: the two sides of MFU.

Floating-point operations of training on one token, a multiply-add being two:

    3 * (2 N + sum over layers of 2 T H d_head + sum over reads of 6 D S_j)

`N`: parameters of all matrix products, the head included whether tied or not (an embedding look-up costs nothing).
The second term is causal attention: each of `T` positions sees (T + 1) / 2 on average, in two products. The third is
the routing: a norm, a logit and a mix of `S_j` sources of width `D` at read `j`. A backward pass costs twice a forward
one; recomputed activations are not counted, so that MFU is comparable with and without checkpointing.
"""

import torch
from torch import nn
from transformers import PreTrainedConfig

from attnres.training.models import depth_plan

# Dense bf16 TFLOP/s (the makers' data sheets) and usable GiB, by a word in the device's name; the first match counts.
GPUS = {
    "b200": (2250.0, 179.0),
    "h200": (989.0, 131.0),
    "h100 pcie": (756.0, 79.0),
    "h100 nvl": (835.0, 93.0),
    "h100": (989.0, 79.0),
    "a100": (312.0, 79.0),
    "l40s": (362.0, 44.0),
    "a10": (125.0, 22.0),
}


def matmul_parameters(model: nn.Module) -> int:
    """Parameters that a token is multiplied with: of linear layers, which routing queries are not."""
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))


def flops_per_token(model: nn.Module, config: PreTrainedConfig, sequence_length: int) -> float:
    """Floating-point operations of one training token (see the module's formula)."""
    attention = config.num_hidden_layers * 2 * sequence_length * config.num_attention_heads * config.head_dim
    plan = depth_plan(config)
    routing = sum(6 * config.hidden_size * read.num_sources for read in plan.reads) if plan else 0
    return 3.0 * (2 * matmul_parameters(model) + attention + routing)


def known_gpu(name: str) -> tuple[float, float] | None:
    """Dense bf16 TFLOP/s and memory (GiB) of a GPU by its name, or None."""
    return next((figures for word, figures in GPUS.items() if word in name.lower()), None)


def peak_flops(device: torch.device, precision: str, given: float | None) -> float | None:
    """FLOP/s that one device could do: as given (TFLOP/s), or a known GPU's in bf16; else None."""
    if given is not None:
        return given * 1e12
    if device.type != "cuda" or precision != "bf16-mixed":
        return None
    figures = known_gpu(torch.cuda.get_device_name(device))
    return figures[0] * 1e12 if figures else None

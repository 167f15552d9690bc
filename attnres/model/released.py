"""How a checkpoint released by open-attention-residuals is recognised, and what it leaves unsaid.

It is recognised by what it lacks. Its `config.json` has `model_type: qwen3_attnres` and names no `attnres_sources`: the
convention follows from the tensors (`named_convention`), or is assumed where only the configuration is read
(`Qwen3AttnResConfig.from_dict`). Its biases are tensors without dimensions, which ours never are (`released_weights`).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from attnres.model.config import RELEASED
from attnres.model.routing import is_final
from attnres.model.weights import read_weights, weight_shapes


def named_convention(stored: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    """An AttnRes configuration with its source convention.

    Args:
        stored: the configuration; one that names no convention is a released one.
        names: of the checkpoint's tensors. Only `seeded_block_sum` has a final read.

    Raises:
        ValueError: it asks for another mode or gate than this model computes.
    """
    for key, known in RELEASED.items():
        if stored.get(key, known) != known:
            raise ValueError(f"{key}={stored[key]!r} is not supported, only {known!r}")
    convention = "seeded_block_sum" if any(is_final(name) for name in names) else "cumulative"
    return {"attnres_sources": convention, **stored}


def released_weights(path: Any) -> dict[str, Tensor] | None:
    """The weights of a local folder with released biases, reshaped to ours; None for anything else."""
    folder = Path(str(path))
    if not folder.is_dir() or () not in weight_shapes(folder).values():
        return None
    return read_weights(folder)

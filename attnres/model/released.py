"""How a checkpoint released by open-attention-residuals is recognised, and what it leaves unsaid.

It is recognised by what it lacks. Its `config.json` has `model_type: qwen3_attnres` and names no `attnres_sources`: the
convention follows from the tensors (`named_convention`), or is assumed where only the configuration is read
(`Qwen3AttnResConfig.from_dict`). Its biases are tensors without dimensions, which ours never are (`weights_read_here`).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from attnres.model.config import RELEASED
from attnres.model.routing import is_final
from attnres.model.weights import held_twice, read_weights, weight_shapes


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


def weights_read_here(path: Any, subfolder: str = "", variant: str | None = None) -> dict[str, Tensor] | None:
    """The weights of a local folder that transformers would read otherwise; None where it reads the same.

    Those are released biases, reshaped to ours, and a tensor that two files of an index hold.

    Raises:
        CheckpointError: an index that cannot be followed.
    """
    folder, variant = Path(str(path)) / subfolder, variant or ""
    if not folder.is_dir():
        return None
    differs = () in weight_shapes(folder, variant).values() or held_twice(folder, variant)
    return read_weights(folder, variant) if differs else None

"""The safetensors files of a Hugging Face folder."""

from pathlib import Path

import safetensors
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a Hugging Face folder; empty if it has none."""
    single = folder / SAFE_WEIGHTS_NAME
    if single.is_file():
        return [single]
    return sorted(folder.glob("model-*-of-*.safetensors")) if (folder / SAFE_WEIGHTS_INDEX_NAME).is_file() else []


def weight_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shape of every stored tensor, from the headers alone."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in weight_files(folder):
        with safetensors.safe_open(path, "pt") as file:
            shapes.update({name: tuple(file.get_slice(name).get_shape()) for name in file.keys()})  # noqa: SIM118
    return shapes


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Every stored tensor; one without dimensions becomes `[1]`, which FSDP2 can shard."""
    weights: dict[str, Tensor] = {}
    for path in weight_files(folder):
        weights.update(load_file(path))
    return {name: tensor.reshape(1) if tensor.ndim == 0 else tensor for name, tensor in weights.items()}

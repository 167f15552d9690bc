"""From a Hugging Face folder to a model: one door for every kind of checkpoint, strict in all of them."""

import dataclasses
import logging
import re
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from attnres.config import strict_keywords
from attnres.errors import CheckpointError, one_line
from attnres.files.whole_files import read_object
from attnres.model.config import Qwen3AttnResConfig
from attnres.model.locate import model_folder
from attnres.model.modeling import Qwen3AttnResForCausalLM
from attnres.model.released import named_convention
from attnres.model.routing import is_bias, newest_alone
from attnres.model.weights import EMBEDDING, HEAD, head_differs, read_weights, weight_files

logger = logging.getLogger(__name__)

# A configuration may claim this many times what its file holds (tied or absent tensors) before it is refused.
_MOST_CLAIMED_OVER_HELD = 4
# What older versions of the library wrote where there is `rope_parameters` and `dtype` now.
_OLD_FIELDS = frozenset({"rope_theta", "rope_scaling", "torch_dtype", "model_type"})


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        return read_object(folder / "config.json")
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"checkpoint {folder}: config.json cannot be read ({error}); copy the folder again"
        ) from error


def _build_config(folder: Path, stored: dict[str, Any], names: set[str]) -> Qwen3Config:
    """The configuration of a checkpoint: data, never code.

    Fields of the configuration alone are taken. `auto_map` names code to import, and the library downloads and runs the
    attention kernel that `attn_implementation` names.
    """
    kind = stored.get("model_type")
    if kind not in ("qwen3", "qwen3_attnres"):
        raise CheckpointError(f"checkpoint {folder}: model_type {kind!r} is neither 'qwen3' nor 'qwen3_attnres'")
    layers = {match[1] for name in names if (match := re.match(r"model\.layers\.(\d+)\.", name))}
    claimed = stored.get("num_hidden_layers")
    # Before anything loops over them.
    if isinstance(claimed, int) and claimed > len(layers):
        raise CheckpointError(
            f"checkpoint {folder}: config.json asks for {claimed:,} layers, the file holds {len(layers)}"
        )
    if kind != "qwen3":
        try:
            stored = named_convention(stored, names)
        except ValueError as error:
            raise CheckpointError(f"checkpoint {folder}: {error}") from error
    config_class: type[Qwen3Config] = Qwen3Config if kind == "qwen3" else Qwen3AttnResConfig
    fields = {field.name for field in dataclasses.fields(config_class)} | _OLD_FIELDS
    stored = {key: value for key, value in stored.items() if key in fields}
    try:
        return config_class.from_dict(stored)
    except Exception as error:  # the library's own validation raises several types
        raise _no_model(folder, error) from error


def _no_model(folder: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"checkpoint {folder}: config.json describes no model: {one_line(error, most=None)}")


@strict_keywords
def load_model(
    path: str | Path, bias: Literal["stored", "init"] = "stored", dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """Load any checkpoint this project knows, strictly: every parameter found, none left over.

    Args:
        path: see `attnres.model.locate.model_folder`. AttnRes and vanilla Qwen3, ours or released by
            open-attention-residuals. A variant (`save_pretrained(variant=...)`) is read where it is all that is there.
        bias: `"stored"` uses the routing biases of the file; `"init"` replaces the newest source's by the
            configuration's `attnres_recency_bias_init`, as some versions of the releasing code did on loading.
        dtype: of the parameters; None keeps the stored one.

    Returns:
        A `Qwen3AttnResForCausalLM` or a `Qwen3ForCausalLM`, in eval mode.

    Raises:
        CheckpointError: where it is missing, unreadable, or does not fit its configuration.
        ValueError: for an unknown `bias`.
    """
    if bias not in ("stored", "init"):
        raise ValueError(f"bias: expected 'stored' or 'init', received {bias!r}")
    folder = model_folder(path)
    stored = _read_config(folder)
    if not weight_files(folder):
        raise CheckpointError(
            f"checkpoint {folder}: no safetensors file inside; pickled weights are not read, convert them"
        )
    try:
        weights = read_weights(folder)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"checkpoint {folder}: weights cannot be read ({error}); copy the folder again"
        ) from error
    config = _build_config(folder, stored, set(weights))
    if config.tie_word_embeddings and head_differs(weights):
        logger.warning(
            "checkpoint %s: config.json ties the head to the embedding, the file holds a head of its own; that one is "
            "used, with tie_word_embeddings: false",
            folder,
        )
        config.tie_word_embeddings = False
    _check_size(folder, config, weights)
    if bias == "init" and isinstance(config, Qwen3AttnResConfig):
        for name in weights:
            if is_bias(name):
                weights[name] = newest_alone(weights[name], config.attnres_recency_bias_init)
    build: Any = Qwen3AttnResForCausalLM if isinstance(config, Qwen3AttnResConfig) else Qwen3ForCausalLM
    stored_dtype = next(iter(weights.values())).dtype
    try:
        with torch.device("meta"):
            model: Any = build(config)
    except Exception as error:  # whatever a value that passed validation leads to
        raise _no_model(folder, error) from error
    # Before anything of the size that the configuration claims is allocated.
    _check_weights(folder, model, weights)
    model = model.to_empty(device="cpu").to(dtype or stored_dtype)
    # Buffers that are not stored (rotary frequencies) come from a real build of the module.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    model.load_state_dict(weights)
    model.tie_weights()
    if isinstance(config, Qwen3AttnResConfig):
        values = [weights[name].float() for name in weights if is_bias(name)]
        flat = torch.cat([value.flatten() for value in values])
        logger.info("routing biases (%s): %.4g to %.4g", bias, flat.min(), flat.max())
    return model.eval()


def _check_size(folder: Path, config: Qwen3Config, weights: dict[str, Tensor]) -> None:
    """Refuse a configuration that would allocate far more than the file holds."""
    claimed = (
        config.num_hidden_layers * config.hidden_size * config.intermediate_size
        + config.vocab_size * config.hidden_size
    )
    held = sum(tensor.numel() for tensor in weights.values())
    if claimed > _MOST_CLAIMED_OVER_HELD * held:
        raise CheckpointError(
            f"checkpoint {folder}: config.json asks for about {claimed:,} parameters, the file holds {held:,}"
        )


def _check_weights(folder: Path, model: PreTrainedModel, weights: dict[str, Tensor]) -> None:
    """Every parameter is there, finite, of its shape, and nothing is left over; adds what is tied to `weights`."""
    if model.config.tie_word_embeddings:
        # Some files hold the head alone; transformers ties the embedding to it, and so does this.
        for name, other in ((HEAD, EMBEDDING), (EMBEDDING, HEAD)):
            if other in weights:
                weights.setdefault(name, weights[other])
    wanted = model.state_dict()
    for what, names in (("missing", wanted.keys() - weights.keys()), ("unexpected", weights.keys() - wanted.keys())):
        if names:
            listed = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
            raise CheckpointError(
                f"checkpoint {folder}: {len(names)} {what} parameters ({listed}) for {model.config.model_type}"
            )
    for name, tensor in weights.items():
        if tensor.shape != wanted[name].shape:
            raise CheckpointError(
                f"checkpoint {folder}: {name} has shape {tuple(tensor.shape)}, the configuration says "
                f"{tuple(wanted[name].shape)}; they do not belong together"
            )
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor.float()).all()):
            raise CheckpointError(
                f"checkpoint {folder}: {name} holds a value that is not finite; use an earlier checkpoint"
            )

"""The model that a training configuration describes: its shape, its first weights, and how its layers execute."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from attnres.config import nearest, unknown_key
from attnres.depth.plan import DepthPlan
from attnres.errors import ConfigError, one_line
from attnres.model.config import Qwen3AttnResConfig
from attnres.model.modeling import Qwen3AttnResForCausalLM
from attnres.training.config import TrainerConfig

KINDS: dict[str, tuple[type[Qwen3Config], type[PreTrainedModel]]] = {
    "attnres": (Qwen3AttnResConfig, Qwen3AttnResForCausalLM),
    "vanilla": (Qwen3Config, Qwen3ForCausalLM),
}


def model_config(plain: Mapping[str, Any], vocab_size: int, eos_id: int, sequence_length: int) -> Qwen3Config:
    """The Hugging Face configuration for `model:` of a training configuration.

    Args:
        plain: `kind` ("attnres" or "vanilla") and fields of that kind's configuration. `vocab_size` may be left out or
            null: then it is the corpus's. `rope_theta` is accepted beside `rope_parameters`.

    Raises:
        ConfigError: unknown kind or key, a value of the wrong type, or a model too small for the data.
    """
    fields = dict(plain)
    kind = fields.pop("kind", None)
    if kind not in KINDS:
        guess = nearest(str(kind), KINDS)
        raise ConfigError(
            f"model.kind: expected one of {', '.join(KINDS)}, got {kind!r}"
            + (f"; did you mean {guess!r}?" if guess else "")
        )
    cls, _ = KINDS[kind]
    known = {field.name for field in dataclasses.fields(cls)} | {"rope_theta"}
    for name in fields:
        # The configuration class keeps unknown keys in silence.
        if name not in known:
            raise unknown_key(f"model.{name}", name, known, "model")
    if fields.get("vocab_size") is None:
        fields["vocab_size"] = vocab_size
    defaults = {
        "bos_token_id": None,
        "eos_token_id": eos_id,
        "pad_token_id": None,
        "max_position_embeddings": sequence_length,
    }
    try:
        config = cls(**(defaults | fields))
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise ConfigError(f"model: {one_line(error, most=None)}") from error
    if config.vocab_size < vocab_size:
        raise ConfigError(
            f"model.vocab_size: {config.vocab_size} is smaller than the corpus's {vocab_size}; raise it or leave it out"
        )
    if config.max_position_embeddings < sequence_length:
        raise ConfigError(
            f"model.max_position_embeddings: {config.max_position_embeddings} is below data.sequence_length"
            f" {sequence_length}; raise it or leave it out"
        )
    if config.num_key_value_heads and config.num_attention_heads % config.num_key_value_heads:
        raise ConfigError(
            f"model.num_key_value_heads: {config.num_key_value_heads} does not divide num_attention_heads"
            f" {config.num_attention_heads}"
        )
    return config


def build_model(config: Qwen3Config, seed: int) -> PreTrainedModel:
    """A model with fp32 weights that depend on `seed` alone, whatever was drawn before."""
    torch.manual_seed(seed)
    model_class = next(model for cls, model in KINDS.values() if type(config) is cls)
    model: PreTrainedModel = model_class(config).float()
    # The padding row of the library's embedding never learns, and the padding token may be the separator of documents.
    embedding: Any = model.get_input_embeddings()
    embedding.padding_idx = None
    return model


def depth_plan(config: PreTrainedConfig) -> DepthPlan | None:
    """Which sources each read of a model sees; None for a model that does not route."""
    return config.plan() if hasattr(config, "plan") else None


def set_execution(model: PreTrainedModel, config: TrainerConfig) -> None:
    """Turns on what changes how the layers execute and not what they compute: recomputation, compilation."""
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if config.compile:
        # By sublayer, which all have one signature; compiling in place leaves parameter names alone.
        for layer in model.model.layers:
            layer.self_attn.compile()
            layer.mlp.compile()

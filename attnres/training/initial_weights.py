"""The model in front of its first step: weights from the seed or from another run, and the choice of what is trained.

The same-base controls: a vanilla run's weights in a routable model, whose routing starts as the base's own additive
residual (`wrap: uniform`), then training of the routing alone, of everything but the routing, or of everything.
"""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from attnres.config import require
from attnres.data import Corpus, prepare
from attnres.errors import CheckpointError, ConfigError
from attnres.files.run_folder import COMPLETE
from attnres.model.config import Qwen3AttnResConfig
from attnres.model.loading import load_model
from attnres.model.locate import Located, locate, vanilla_runs
from attnres.model.routing import is_bias, is_routing
from attnres.training.config import AUTO, Trainable, TrainConfig
from attnres.training.models import build_model, model_config

log = logging.getLogger(__name__)

# Fields of a model's configuration that do not change what its weights compute.
_WITHOUT_EFFECT = frozenset(
    {
        "_name_or_path",
        "architectures",
        "attnres_recency_bias_init",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "max_position_embeddings",
        "model_type",
        "pad_token_id",
        "transformers_version",
        "use_cache",
    }
)


def resolve_base(config: TrainConfig) -> tuple[TrainConfig, Located | None]:
    """Finds the weights that a run starts from, and checks that they belong to it.

    Returns:
        The configuration with `init` filled in, and the base; the configuration as it is and None for a run
        that starts from its seed.

    Raises:
        ConfigError: there is no base, or it is still training, or this run would not start with its base's function.
        DataError: the run's own text is missing.
        CheckpointError: the base is missing or damaged, has other weights than `init.digest` says, saw other data or
            another tokenizer, or has another shape.
    """
    if config.init.base is None:
        return config, None
    corpus = prepare(config.data)
    architecture = _architecture(config, corpus)
    _require_wrappable(config, architecture)
    base = locate(_the_vanilla_run(config, corpus, architecture) if config.init.base == AUTO else config.init.base)
    # A named step keeps its bytes; a run that is still training would give other weights the next time.
    if base.finished is False and not _names_step(config.init.base, base):
        raise ConfigError(f"init.base: {base.run} is not complete; finish it, or name one of its checkpoints/step_*")
    if config.init.digest not in (None, base.digest):
        raise CheckpointError(
            f"init.base: {base.folder} has the digest {base.digest}, init.digest says {config.init.digest}; "
            "name the weights that are meant, or leave init.digest out"
        )
    for name, here in (("fingerprint", corpus.fingerprint), ("tokenizer_sha256", corpus.tokenizer_sha256)):
        there = base.data.get(name)
        if there != here:
            raise CheckpointError(
                f"init.base: {base.folder} does not fit this run's data: {name} {there!r} there, {here!r} here; "
                "name a base that was trained on this data"
            )
    log.info("init: starting from %s, digest %s", base.folder, base.digest)
    init = dataclasses.replace(config.init, base=str(base.folder), digest=base.digest)
    return dataclasses.replace(config, init=init), base


def initial_model(config: TrainConfig, corpus: Corpus, base: Located | None) -> PreTrainedModel:
    """The model of a run, with gradients off for what is not to be trained.

    Args:
        base: from `resolve_base`; None keeps the weights that the seed gives.

    Raises:
        ConfigError: a model that cannot be, or one that has nothing to train.
        CheckpointError: the base is of another kind or shape.
    """
    model = build_model(_architecture(config, corpus), config.seed)
    if base is not None:
        _start_from(model, base, config.init.wrap)
    freeze(model, config.trainable)
    return model


def _start_from(model: PreTrainedModel, base: Located, wrap: str | None) -> None:
    """Copies a base's weights into a freshly built model, strictly.

    With `wrap` the base is a vanilla Qwen3, and the model's routing keeps the start that its configuration gives it:
    zero queries, and biases of zero (`uniform`) or `attnres_recency_bias_init` on the newest source (`recency`).

    Raises:
        CheckpointError: the base is of another kind or shape.
    """
    loaded = load_model(base.folder, dtype=torch.float32)
    if wrap is not None and not isinstance(loaded, Qwen3ForCausalLM):
        raise CheckpointError(
            f"init.base: {base.folder} is no vanilla Qwen3, which init.wrap={wrap} wraps; name a vanilla run, or set "
            "init.wrap to null"
        )
    if wrap is None and type(loaded) is not type(model):
        raise CheckpointError(
            f"init.base: {base.folder} holds a {type(loaded).__name__}, this run trains a {type(model).__name__}; name "
            "a base of that kind, or set init.wrap to uniform or recency to wrap a vanilla one"
        )
    _require_same_shape(base, loaded.config, model.config)
    missing, unexpected = model.load_state_dict(loaded.state_dict(), strict=False)
    strange = [name for name in missing if wrap is None or not is_routing(name)] + list(unexpected)
    if strange:
        raise CheckpointError(f"init.base: {base.folder} does not fill this model: {', '.join(strange[:3])}")


def freeze(model: nn.Module, trainable: Trainable) -> None:
    """Turns off gradients of everything that is not to be trained; never turns any on.

    Raises:
        ConfigError: nothing would be left.
    """
    wanted = {
        "all": lambda name: True,
        "routing": is_routing,
        "routing_bias": is_bias,
        "body": lambda name: not is_routing(name),
    }[trainable]
    for name, parameter in model.named_parameters():
        if not wanted(name):
            parameter.requires_grad = False
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(
            f"trainable: {trainable!r} leaves nothing to train in this model; use all, or model.kind=attnres"
        )


def _architecture(config: TrainConfig, corpus: Corpus) -> Qwen3Config:
    return model_config(config.model, corpus.vocab_size, corpus.eos_id, config.data.sequence_length)


def _require_wrappable(config: TrainConfig, architecture: Qwen3Config) -> None:
    """The model must compute what its vanilla base does (or, under `recency`, nearly) at the first step."""
    wrap = config.init.wrap
    if wrap is None:
        return
    require(
        isinstance(architecture, Qwen3AttnResConfig),
        f"init.wrap: {wrap} makes an AttnRes model of a vanilla one; set model.kind to attnres",
    )
    fields: dict[str, Any] = {"attnres_sources": "cumulative"}
    if wrap == "uniform":
        fields = {"attnres_sources": "block_sum", "attnres_exact_uniform": True, "attnres_recency_bias_init": 0.0}
    for name, wanted in fields.items():
        value = getattr(architecture, name)
        require(value == wanted, f"init.wrap: {wrap} needs model.{name}={wanted}, got {value}")


def _the_vanilla_run(config: TrainConfig, corpus: Corpus, architecture: Qwen3Config) -> str:
    """The path of the one finished vanilla run in `runs_dir` that fits as a base."""
    data = {"fingerprint": corpus.fingerprint, "tokenizer_sha256": corpus.tokenizer_sha256}
    runs_dir = Path(config.runs_dir)
    runs = [
        run for run in vanilla_runs(runs_dir, data, architecture.to_dict(), config.seed) if (run / COMPLETE).is_file()
    ]
    if not runs:
        raise ConfigError(
            f"init.base: no complete vanilla run in {runs_dir} has the data, tokenizer, shape and seed of this run; "
            "name one with init.base=PATH, or train it: python train.py +experiment=vanilla_small (or the vanilla_* of "
            "your shape)"
        )
    if len(runs) > 1:
        names = ", ".join(run.name for run in runs)
        raise ConfigError(
            f"init.base: {len(runs)} vanilla runs in {runs_dir} fit ({names}); choose with init.base=PATH"
        )
    return str(runs[0])


def _names_step(path: str, base: Located) -> bool:
    """Whether a path is the base's step folder, or inside it."""
    given = Path(path).resolve()
    return base.folder.parent.resolve() in (given, *given.parents)


def _require_same_shape(base: Located, there: PreTrainedConfig, here: PreTrainedConfig) -> None:
    ours, theirs = here.to_dict(), there.to_dict()
    # Fields that only one kind of model has are not compared; those that the library fills in are.
    names = (ours.keys() & theirs.keys()) - _WITHOUT_EFFECT
    differing = [
        f"{name} {theirs[name]!r} there, {ours[name]!r} here" for name in sorted(names) if ours[name] != theirs[name]
    ]
    if differing:
        raise CheckpointError(
            f"init.base: {base.folder} has another shape: {'; '.join(differing)}; change model. to agree"
        )

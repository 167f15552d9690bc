"""The further models of a probe: AttnRes checkpoints to compare with, and nulls of the trained model."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from attnres.data import Corpus
from attnres.errors import CheckpointError, ConfigError
from attnres.model.loading import load_model
from attnres.model.locate import Located, locate
from attnres.model.modeling import Qwen3AttnResForCausalLM
from attnres.model.wraps import SCHEDULES
from attnres.probe.config import ProbeConfig
from attnres.probe.nulls import NULLS, null_model
from attnres.probe.passes import Subject
from attnres.tables.roles import TRAINED

_TAKEN = (TRAINED, *SCHEDULES, *NULLS)
_NULL_KINDS = {"untrained": "null: untrained AttnRes", "shuffled_queries": "null: queries shuffled across reads"}


@dataclass(frozen=True)
class Further:
    """A model beside the trained one and its wrapped baseline.

    Attributes:
        subject: the model under its name.
        located: where its weights came from; those of the trained model for a null.
        kind: what it is, in words.
    """

    subject: Subject
    located: Located
    kind: str


def locate_controls(config: ProbeConfig, trained: Located) -> dict[str, Located]:
    """Name -> checkpoint of every control, in the order given; a path without a name goes by its experiment's.

    Raises:
        ConfigError: a name that is taken, or another tokenizer than the trained model's.
        CheckpointError: as `locate`.
    """
    given = config.controls or ()
    named = given.items() if isinstance(given, Mapping) else (("", path) for path in given)
    found: dict[str, Located] = {}
    for name, path in named:
        located = locate(path)
        name = name or str(located.training.get("name") or located.run)
        if name in _TAKEN or name in found:
            raise ConfigError(
                f"controls: the name {name!r} of {path} is taken; give it another, e.g. controls={{{name}_2:{path}}}"
            )
        for key in ("tokenizer_sha256", "fingerprint"):
            values = {where.data.get(key) for where in (located, trained)} - {None}
            if len(values) > 1:
                raise ConfigError(
                    f"controls: {located.run} has another {key} than {trained.run}; name a run on the same data"
                )
        found[name] = located
    return found


def further_subjects(
    config: ProbeConfig,
    controls: Mapping[str, Located],
    trained: Qwen3AttnResForCausalLM,
    trained_at: Located,
    corpus: Corpus,
) -> list[Further]:
    """The controls, loaded like the trained model, and the nulls that `probe.nulls` asks for.

    Raises:
        ConfigError: another depth or a smaller vocabulary than the probe needs; a null that changes nothing.
        CheckpointError: a control that is no AttnRes model.
    """
    further = []
    for name, located in controls.items():
        loaded: nn.Module = load_model(located.folder, bias=config.probe.bias, dtype=torch.float32)
        model = loaded.to(trained.device)
        if not isinstance(model, Qwen3AttnResForCausalLM):
            raise CheckpointError(
                f"controls: {located.folder} holds a vanilla Qwen3; name AttnRes runs, and a vanilla one as baseline="
            )
        layers, wanted = model.config.num_hidden_layers, trained.config.num_hidden_layers
        if layers != wanted:
            raise ConfigError(f"controls: {name} has {layers} layers against {wanted}, so bands would not compare")
        if model.config.vocab_size < corpus.vocab_size:
            raise ConfigError(
                f"controls: the vocabulary of {name}, {model.config.vocab_size}, is smaller than the tokenizer's "
                f"{corpus.vocab_size}"
            )
        further.append(Further(Subject(name, model), located, f"control AttnRes, {located.run}"))
    # The seed of its training draws the weights that the trained model itself began with.
    seed = trained_at.training.get("seed", config.probe.seed)
    for name in config.probe.nulls:
        further.append(Further(Subject(name, null_model(name, trained, seed)), trained_at, _NULL_KINDS[name]))
    return further

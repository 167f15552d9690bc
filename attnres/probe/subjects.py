"""The models of a probe: the checkpoint, its baseline in every wrap, controls, and nulls of the checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from transformers import Qwen3ForCausalLM

from attnres.depth.plan import DepthPlan
from attnres.errors import CheckpointError, ConfigError
from attnres.model.loading import load_model
from attnres.model.locate import Located, locate, locate_baseline
from attnres.model.modeling import Qwen3AttnResForCausalLM
from attnres.model.wraps import SCHEDULES, wrap_qwen3
from attnres.probe.config import ProbeConfig, config_hash
from attnres.probe.nulls import NULLS, null_model
from attnres.probe.text import ProbeText, probe_text
from attnres.processes.ranks import Ranks
from attnres.tables.folder import stays_text
from attnres.tables.roles import TRAINED

_TAKEN = (TRAINED, *SCHEDULES, *NULLS)
_NULL_KINDS = {"untrained": "null: untrained AttnRes", "shuffled_queries": "null: queries shuffled across reads"}


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints that a configuration names, found and verified.

    Attributes:
        trained: what is probed.
        baseline: the vanilla model.
        controls: name -> checkpoint of every control, in the order given.
    """

    trained: Located
    baseline: Located
    controls: Mapping[str, Located]

    @property
    def digests(self) -> dict[str, str]:
        """What each is of -> digest of its weights and configuration."""
        controls = {f"control {name}": located.digest for name, located in self.controls.items()}
        return {"checkpoint": self.trained.digest, "baseline": self.baseline.digest} | controls


@dataclass(frozen=True)
class Subject:
    """A model under the probe.

    Attributes:
        name: `"attnres"`, the schedule of a wrapped baseline, or the name of a control or a null.
        model: in eval mode, on its device.
        schedule: `"recency"`, `"uniform"`, or None for learned routing.
        recency_bias: bias b of the recency schedule.
        located: where its weights came from, those of the trained model for a null; None for a model made in memory.
        kind: what it is, in words.
    """

    name: str
    model: Qwen3AttnResForCausalLM
    schedule: Literal["recency", "uniform"] | None = None
    recency_bias: float = 0.0
    located: Located | None = None
    kind: str = ""

    @property
    def plan(self) -> DepthPlan:
        return self.model.model.plan

    @property
    def routing_trained(self) -> bool:
        """Whether its routing was trained, as the run that its weights came from says."""
        training = (self.located.training.get("config") if self.located else None) or {}
        return self.schedule is None and self.name not in NULLS and training.get("trainable") != "body"


@dataclass(frozen=True)
class Subjects:
    """Everything that is probed.

    Attributes:
        models: the trained one, the wraps of its baseline, controls, nulls.
        vanilla: the baseline without a wrap.
        text: what they read.
        hashes: of what -> hash of text, tokenizer and every checkpoint.
    """

    models: tuple[Subject, ...]
    vanilla: Qwen3ForCausalLM
    text: ProbeText
    hashes: Mapping[str, str | None]

    @property
    def trained(self) -> Subject:
        return self.models[0]

    @property
    def plans(self) -> dict[str, DepthPlan]:
        """Model -> its depth plan; the models of a probe are equally deep."""
        return {subject.name: subject.plan for subject in self.models}


def locate_checkpoints(config: ProbeConfig) -> Checkpoints:
    """Find and verify what a configuration names.

    Raises:
        ConfigError: no baseline, a name of a control that is taken, or another tokenizer than the trained model's.
        CheckpointError: as `locate`.
    """
    trained = locate(config.ckpt)
    return Checkpoints(trained, locate_baseline(config.baseline, trained), _locate_controls(config, trained))


def probe_folder(config: ProbeConfig, checkpoints: Checkpoints) -> Path:
    """Where a probe is written: named by its configuration and by the weights that it looks at."""
    digest = config_hash(config, list(checkpoints.digests.values()))
    return Path(config.runs_dir) / f"probe_{checkpoints.trained.run}-{digest}"


def load_subjects(config: ProbeConfig, checkpoints: Checkpoints, ranks: Ranks) -> Subjects:
    """The models in fp32 on this process's device, and their text.

    Raises:
        ConfigError: another depth, a smaller vocabulary or another tokenizer than the probe needs; a null that changes
            nothing.
        CheckpointError: a checkpoint that holds another kind of model.
        DataError: no windows, or another text than the checkpoint's.
    """
    text = probe_text(config, checkpoints.trained, ranks)
    trained, vanilla = _load(config, checkpoints, ranks.device)
    _require_vocabulary("ckpt", trained, text)
    _require_vocabulary("baseline", vanilla, text)
    if vanilla.config.num_hidden_layers != trained.config.num_hidden_layers:
        raise ConfigError(
            f"baseline: {vanilla.config.num_hidden_layers} layers against {trained.config.num_hidden_layers}, so bands "
            "would not compare; name a vanilla model of the same depth"
        )
    controls = [_control(name, located, config, trained, text) for name, located in checkpoints.controls.items()]
    # The seed of its training draws the weights that the trained model itself began with.
    seed = checkpoints.trained.training.get("seed", config.probe.seed)
    nulls = [
        Subject(name, null_model(name, trained, seed), located=checkpoints.trained, kind=_NULL_KINDS[name])
        for name in config.probe.nulls
    ]
    blocks, bias = trained.config.attnres_num_blocks, config.probe.recency_bias
    wraps = [
        Subject(
            name=schedule,
            model=wrap_qwen3(vanilla, schedule, blocks, bias),
            schedule=schedule,
            recency_bias=bias if schedule == "recency" else 0.0,
            located=checkpoints.baseline,
            kind=f"vanilla Qwen3, {schedule} wrap",
        )
        for schedule in config.probe.schedules
    ]
    first = Subject(TRAINED, trained, located=checkpoints.trained, kind="trained AttnRes")
    hashes = {"data": text.corpus.fingerprint, "tokenizer": text.corpus.tokenizer_sha256, **checkpoints.digests}
    return Subjects((first, *wraps, *controls, *nulls), vanilla, text, hashes)


def _locate_controls(config: ProbeConfig, trained: Located) -> dict[str, Located]:
    """Name -> checkpoint of every control, in the order given; a path without a name goes by its experiment's."""
    given = config.controls or ()
    named = given.items() if isinstance(given, Mapping) else (("", path) for path in given)
    controls: dict[str, Located] = {}
    for name, path in named:
        located = locate(path)
        name = name or str(located.training.get("name") or located.run)
        if name in _TAKEN or name in controls:
            raise ConfigError(
                f"controls: the name {name!r} of {path} is taken; give it another, e.g. controls={{{name}_2:{path}}}"
            )
        if not stays_text(name):
            raise ConfigError(
                f"controls: a reader of the tables takes the name {name!r} for a number or a missing value; give "
                f"{path} another, e.g. controls={{control_{name}:{path}}}"
            )
        for key in ("tokenizer_sha256", "fingerprint"):
            values = {where.data.get(key) for where in (located, trained)} - {None}
            if len(values) > 1:
                raise ConfigError(
                    f"controls: {located.run} has another {key} than {trained.run}; name a run on the same data"
                )
        controls[name] = located
    return controls


def _load(
    config: ProbeConfig, checkpoints: Checkpoints, device: torch.device
) -> tuple[Qwen3AttnResForCausalLM, Qwen3ForCausalLM]:
    """The trained model and the vanilla one."""
    trained_at, baseline_at = checkpoints.trained, checkpoints.baseline
    # fp32 whatever was stored: effects are differences of small numbers.
    trained: nn.Module = load_model(trained_at.folder, bias=config.probe.bias, dtype=torch.float32)
    vanilla: nn.Module = load_model(baseline_at.folder, dtype=torch.float32)
    trained, vanilla = trained.to(device), vanilla.to(device)
    if not isinstance(trained, Qwen3AttnResForCausalLM):
        raise CheckpointError(
            f"ckpt: {trained_at.folder} holds a vanilla Qwen3; name an AttnRes run, and this one as baseline="
        )
    if not isinstance(vanilla, Qwen3ForCausalLM):
        raise CheckpointError(f"baseline: {baseline_at.folder} holds no vanilla Qwen3; name a vanilla run")
    tokenizers = {where.data.get("tokenizer_sha256") for where in (trained_at, baseline_at)} - {None}
    if len(tokenizers) > 1:
        raise ConfigError(
            f"baseline: {baseline_at.run} uses another tokenizer than {trained_at.run}; effects would not compare"
        )
    return trained, vanilla


def _control(
    name: str, located: Located, config: ProbeConfig, trained: Qwen3AttnResForCausalLM, text: ProbeText
) -> Subject:
    """A control, loaded like the trained model."""
    loaded: nn.Module = load_model(located.folder, bias=config.probe.bias, dtype=torch.float32)
    model = loaded.to(trained.device)
    if not isinstance(model, Qwen3AttnResForCausalLM):
        raise CheckpointError(
            f"controls: {located.folder} holds a vanilla Qwen3; name AttnRes runs, and a vanilla one as baseline="
        )
    layers, wanted = model.config.num_hidden_layers, trained.config.num_hidden_layers
    if layers != wanted:
        raise ConfigError(f"controls: {name} has {layers} layers against {wanted}, so bands would not compare")
    _require_vocabulary(f"controls: {name}", model, text)
    return Subject(name, model, located=located, kind=f"control AttnRes, {located.run}")


def _require_vocabulary(key: str, model: Qwen3AttnResForCausalLM | Qwen3ForCausalLM, text: ProbeText) -> None:
    size, needed = model.config.vocab_size, text.corpus.vocab_size
    if size < needed:
        raise ConfigError(f"{key}: vocabulary of {size} is smaller than the tokenizer's {needed}")

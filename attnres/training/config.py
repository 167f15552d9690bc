"""What a training run is made of, frozen and validated, and the name of the folder that it decides.

Keys that are not `hashed` say where and how a run executes, or how often it is saved and logged, not what it computes.
A run that is requeued on other hardware, or restarted with another micro-batch, must find its own folder. They change
results by floating-point rounding at most.
"""

import math
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from attnres.config import decisive, key, require, to_plain
from attnres.data.config import DataConfig
from attnres.files.hashes import content_hash

Loss = Literal["auto", "plain", "chunked", "torch"]

Trainable = Literal["all", "routing", "routing_bias", "body"]
AUTO = "auto"
_execution = partial(key, hashed=False)


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, linear warm-up over `warmup_steps`, then cosine to `min_lr_ratio * lr` at the last step.

    `grad_clip` is the largest global gradient norm; 0 turns clipping off.
    """

    lr: float = 3e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    warmup_steps: int = 30
    min_lr_ratio: float = 0.1
    grad_clip: float = 1.0

    def __post_init__(self) -> None:
        require(math.isfinite(self.lr) and self.lr > 0, f"lr: expected a number > 0, got {self.lr}")
        require(all(0 <= b < 1 for b in self.betas), f"betas: expected two numbers in [0, 1), got {self.betas}")
        require(math.isfinite(self.eps) and self.eps > 0, f"eps: expected a number > 0, got {self.eps}")
        require(self.weight_decay >= 0, f"weight_decay: expected a number >= 0, got {self.weight_decay}")
        require(self.warmup_steps >= 0, f"warmup_steps: expected an integer >= 0, got {self.warmup_steps}")
        require(0 <= self.min_lr_ratio <= 1, f"min_lr_ratio: expected 0 to 1, got {self.min_lr_ratio}")
        require(self.grad_clip >= 0, f"grad_clip: expected a number >= 0 (0: off), got {self.grad_clip}")


@dataclass(frozen=True)
class TrainerConfig:
    """How long, how large and on what. A step is an optimizer step; batch sizes count sequences.

    `*_every_steps = 0` means never, except that a run always validates and saves at its last step.
    `val_batches` counts global batches, so that the validation windows do not depend on how a batch is split.
    `threads = None` leaves torch's own choice.

    `keep_last` of the checkpoints that `checkpoint_every_steps` asks for are kept; those at multiples of
    `milestone_every_steps` and at the steps `round(b**k)` of `log_spaced = b` (`true`: 2) are written too and stay.
    With `async_checkpoint` all but the last are written while training goes on, from a copy in host memory.
    `loss` is how the NLL over the vocabulary is computed (see `attnres.training.loss`). `peak_tflops` is what one
    device could do at the run's precision, for MFU; None takes it from a table of known GPUs.
    """

    # A run that starts from another run's checkpoint may be longer, and measured differently, than that run.
    max_steps: int = key(240, may_differ=True)
    global_batch_size: int = 16
    micro_batch_size: int = _execution(16)
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    accelerator: str = _execution("auto")
    devices: int | Literal["auto"] = _execution(1)
    num_nodes: int = _execution(1)
    strategy: Literal["auto", "ddp", "fsdp2"] = _execution("auto")
    num_workers: int = _execution(0)
    threads: int | None = _execution(None)
    compile: bool = _execution(False)
    gradient_checkpointing: bool = _execution(False)
    val_every_steps: int = _execution(100)
    val_batches: int = key(4, may_differ=True)
    log_every_steps: int = _execution(10)
    routing_every_steps: int = _execution(100)
    checkpoint_every_steps: int = _execution(100)
    keep_last: int = _execution(2)
    milestone_every_steps: int = _execution(0)
    log_spaced: bool | float = _execution(False)
    async_checkpoint: bool = _execution(False)
    loss: Loss = _execution("auto")
    peak_tflops: float | None = _execution(None)

    def __post_init__(self) -> None:
        at_least_one = (
            "max_steps",
            "global_batch_size",
            "micro_batch_size",
            "num_nodes",
            "val_batches",
            "log_every_steps",
            "keep_last",
        )
        for name in at_least_one:
            require(getattr(self, name) >= 1, f"{name}: expected an integer >= 1, got {getattr(self, name)}")
        never_is_zero = ("val_every_steps", "routing_every_steps", "checkpoint_every_steps", "milestone_every_steps")
        for name in ("num_workers", *never_is_zero):
            require(getattr(self, name) >= 0, f"{name}: expected an integer >= 0, got {getattr(self, name)}")
        for name in ("devices", "threads"):
            value = getattr(self, name)
            require(not isinstance(value, int) or value >= 1, f"{name}: expected an integer >= 1, got {value}")
        require(
            isinstance(self.log_spaced, bool) or self.log_spaced >= 1.1,
            f"log_spaced: expected true, false or a base >= 1.1, got {self.log_spaced}",
        )
        require(
            self.peak_tflops is None or self.peak_tflops > 0,
            f"peak_tflops: expected a number > 0 or null, got {self.peak_tflops}",
        )
        require(
            self.loss != "torch" or self.precision == "32-true",
            "loss: torch adds up bf16 losses in bf16, which is off by a tenth; use chunked, or precision=32-true",
        )
        require(
            self.global_batch_size % self.micro_batch_size == 0,
            f"micro_batch_size: {self.micro_batch_size} does not divide global_batch_size"
            f" {self.global_batch_size}; change one of them",
        )


@dataclass(frozen=True)
class LoggerConfig:
    """Weights & Biases beside the CSV file, which is always written. It is never a reason to stop."""

    wandb: Literal["offline", "online", "disabled"] = "offline"
    project: str = "attnres"
    entity: str | None = None


@dataclass(frozen=True)
class InitConfig:
    """The weights that a run starts from; without a base they are drawn from `seed`.

    `base` is a run (with or without its hash), one of its checkpoints, or a model folder; "auto" is the one complete
    vanilla run in `runs_dir` with this run's data, tokenizer, shape and seed. `wrap` says how a vanilla base starts as
    an AttnRes model (as in `attnres.wrap_qwen3`); None takes a base of the same kind with all its weights. `digest` is
    that of the base's weights: filled in, and checked where it is given.
    """

    # Which weights it names decides (`digest`), not where they lie.
    base: str | None = _execution(None)
    wrap: Literal["uniform", "recency"] | None = None
    digest: str | None = None

    def __post_init__(self) -> None:
        require(self.base != "", "base: expected auto, a path or null, got ''")
        for name in ("wrap", "digest"):
            require(
                self.base is not None or getattr(self, name) is None,
                f"{name}: {getattr(self, name)!r} needs init.base, the weights to start from: give init.base=PATH",
            )


@dataclass(frozen=True)
class TrainConfig:
    """One training run.

    `trainable` is what learns: "all", "routing" (queries, key norms, biases of the reads), "routing_bias", or "body"
    (all but the routing, which stays as it starts: uniform). `model` holds `kind` ("attnres" or "vanilla") and fields
    of the model's Hugging Face configuration;
    `resume` is "auto", "must", "never" or the path of a checkpoint folder or run folder; `debug` finds the
    operation behind a NaN gradient, slowly.
    """

    model: dict[str, Any]
    name: str = _execution()
    seed: int = 0
    resume: str = _execution("auto")
    runs_dir: str = _execution("runs")
    debug: bool = _execution(False)
    trainable: Trainable = key("all", as_before="all")
    init: InitConfig = key(InitConfig, as_before={"wrap": None, "digest": None})
    data: DataConfig = key(DataConfig)
    optim: OptimConfig = key(OptimConfig)
    trainer: TrainerConfig = key(TrainerConfig)
    logger: LoggerConfig = _execution(LoggerConfig)

    def __post_init__(self) -> None:
        require(
            re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name) is not None,
            f"name: expected letters, digits, '.', '_' or '-' (it names a folder), got {self.name!r}",
        )
        require(0 <= self.seed < 2**63, f"seed: expected 0 <= seed < 2**63, got {self.seed}")
        require(bool(self.resume), "resume: expected auto, must, never or a path, got ''")
        require(
            self.optim.warmup_steps <= self.trainer.max_steps,
            f"optim.warmup_steps: {self.optim.warmup_steps} exceeds trainer.max_steps"
            f" {self.trainer.max_steps}; lower it too",
        )


def config_hash(config: TrainConfig) -> str:
    """Eight hex digits of the hash of the part of a configuration that decides what is learned and measured."""
    return content_hash(decisive(TrainConfig, to_plain(config)))[:8]


def run_folder(config: TrainConfig) -> Path:
    """`<runs_dir>/<name>-<hash>`: the same configuration always lands in the same folder."""
    return Path(config.runs_dir) / f"{config.name}-{config_hash(config)}"

"""What a training run is made of: frozen, validated settings, and the name of the folder that they decide."""

import hashlib
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from attnres.config import require, to_plain
from attnres.data import DataConfig

Loss = Literal["auto", "plain", "chunked", "torch"]

# Keys that say where and how a run executes, or how often it is saved and logged, not what it computes. A run
# that is requeued on other hardware, or restarted with a different micro-batch, must find its own folder, so
# these are left out of the hash. They change results by floating-point rounding at most.
EXECUTION_KEYS = frozenset(
    {
        "name",
        "resume",
        "runs_dir",
        "debug",
        "logger",
        # Which weights it names decides, `init.digest`, not where they lie.
        "init.base",
        "data.cache_dir",
        "data.obtain",
        "trainer.micro_batch_size",
        "trainer.accelerator",
        "trainer.devices",
        "trainer.num_nodes",
        "trainer.strategy",
        "trainer.num_workers",
        "trainer.threads",
        "trainer.compile",
        "trainer.gradient_checkpointing",
        "trainer.val_every_steps",
        "trainer.log_every_steps",
        "trainer.routing_every_steps",
        "trainer.checkpoint_every_steps",
        "trainer.keep_last",
        "trainer.milestone_every_steps",
        "trainer.log_spaced",
        "trainer.async_checkpoint",
        "trainer.loss",
        "trainer.peak_tflops",
    }
)
# Values that ask for nothing beyond what a run without the key does; such a run's folder does not depend on them.
_ASKS_NOTHING = {"init": {"wrap": None, "digest": None}, "trainable": "all"}

Trainable = Literal["all", "routing", "routing_bias", "body"]
AUTO = "auto"


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, linear warm-up over `warmup_steps`, then cosine to `min_lr_ratio * lr` at the last step.

    `grad_clip` is the largest global gradient norm; 0 turns clipping off.
    """

    lr: float = 3e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    warmup_steps: int = 100
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

    max_steps: int = 200
    global_batch_size: int = 16
    micro_batch_size: int = 16
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    accelerator: str = "auto"
    devices: int | Literal["auto"] = 1
    num_nodes: int = 1
    strategy: Literal["auto", "ddp", "fsdp2"] = "auto"
    num_workers: int = 0
    threads: int | None = None
    compile: bool = False
    gradient_checkpointing: bool = False
    val_every_steps: int = 100
    val_batches: int = 8
    log_every_steps: int = 10
    routing_every_steps: int = 100
    checkpoint_every_steps: int = 100
    keep_last: int = 2
    milestone_every_steps: int = 0
    log_spaced: bool | float = False
    async_checkpoint: bool = False
    loss: Loss = "auto"
    peak_tflops: float | None = None

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

    base: str | None = None
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
    name: str = "tiny"
    seed: int = 0
    resume: str = "auto"
    runs_dir: str = "runs"
    debug: bool = False
    trainable: Trainable = "all"
    init: InitConfig = field(default_factory=InitConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)

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


def result_config(config: TrainConfig) -> dict[str, Any]:
    """The part of a configuration that decides what is learned and measured, as plain containers."""
    return without_execution_keys(to_plain(config))


def without_execution_keys(plain: dict[str, Any]) -> dict[str, Any]:
    """Leaves `EXECUTION_KEYS`, and what asks for nothing, out of a plain configuration."""
    kept: dict[str, Any] = {}
    for key, value in plain.items():
        if key in EXECUTION_KEYS:
            continue
        if isinstance(value, dict):
            value = {inner: item for inner, item in value.items() if f"{key}.{inner}" not in EXECUTION_KEYS}
        if key not in _ASKS_NOTHING or value != _ASKS_NOTHING[key]:
            kept[key] = value
    if "data" in kept and not kept["data"].get("weights", True):
        # A run on one set keeps the name that it had before sets could be mixed.
        del kept["data"]["weights"]
    return kept


def config_hash(config: TrainConfig) -> str:
    """Eight hex digits of the SHA-256 of the canonical JSON of `result_config`."""
    canonical = json.dumps(result_config(config), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:8]


def run_folder(config: TrainConfig) -> Path:
    """`<runs_dir>/<name>-<hash>`: the same configuration always lands in the same folder."""
    return Path(config.runs_dir) / f"{config.name}-{config_hash(config)}"

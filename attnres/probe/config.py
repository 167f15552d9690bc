"""What a probe is made of: frozen, validated settings."""

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any, Literal

from attnres.config import require, to_plain
from attnres.interventions.config import GridConfig
from attnres.statistics.config import StatisticsConfig

# Keys that say where and how a probe executes, not what it measures.
EXECUTION_KEYS = ("runs_dir", "cache_dir", "device", "devices", "threads", "debug")


@dataclass(frozen=True)
class ProbeConfig:
    """One probe.

    Attributes:
        ckpt: what is probed; see `attnres.model.loading.model_folder`. A run may be named without its hash.
        baseline: a vanilla Qwen3, or None to look for the matching run beside the checkpoint.
        controls: further AttnRes checkpoints to probe and to compare with, by name, or a list of them that go by the
            names of their experiments.
        data: keys of `DataConfig` that differ from the checkpoint's; for a released checkpoint, which text to read.
        runs_dir: where the probe's folder goes.
        cache_dir: where token shards are cached.
        device: `"auto"`, `"cpu"` or `"cuda"`.
        devices: GPUs, or processes on a CPU, that share the work; torchrun's number of them where it is used.
        threads: of torch; None leaves its own choice.
        debug: show tracebacks.
    """

    ckpt: str
    baseline: str | None = None
    controls: dict[str, Any] | tuple[str, ...] | None = None
    data: dict[str, Any] = field(default_factory=dict)
    runs_dir: str = "runs"
    cache_dir: str = "cache"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    devices: int = 1
    threads: int | None = None
    debug: bool = False
    probe: GridConfig = field(default_factory=GridConfig)
    statistics: StatisticsConfig = field(default_factory=StatisticsConfig)

    def __post_init__(self) -> None:
        require(self.devices >= 1, f"devices: expected at least 1, received {self.devices}")
        for name, path in self.controls.items() if isinstance(self.controls, dict) else ():
            require(isinstance(path, str), f"controls.{name}: expected a path, received {path!r}")


def config_hash(config: ProbeConfig, models: list[str]) -> str:
    """Eight hex digits of what is measured on which weights; `models` are the digests of the checkpoints."""
    plain = {key: value for key, value in to_plain(config).items() if key not in EXECUTION_KEYS}
    return digest([plain, models])[:8]


def digest(plain: Any) -> str:
    """Sixteen hex digits of plain containers."""
    canonical = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]

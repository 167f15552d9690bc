"""What a probe is made of: frozen, validated settings."""

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any, Literal

from attnres.config import require, to_plain
from attnres.model.families import BANDS, FAMILIES, SUBLAYERS
from attnres.probe.inference import StatisticsConfig

# Keys that say where and how a probe executes, not what it measures.
EXECUTION_KEYS = ("runs_dir", "cache_dir", "device", "threads", "debug")


def _names(value: str | tuple[str, ...], known: tuple[str, ...], key: str) -> tuple[str, ...]:
    """`all`, one name, names joined by commas, or a tuple of names -> the names, in canonical order."""
    given = tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else value
    given = known if given == ("all",) else given
    for name in given:
        require(name in known, f"probe.{key}: expected all or some of {', '.join(known)}, received {name!r}")
    require(bool(given), f"probe.{key}: expected at least one of {', '.join(known)}, received none")
    return tuple(name for name in known if name in given)


@dataclass(frozen=True)
class GridConfig:
    """Which cells, on which windows.

    Attributes:
        families, sublayers, bands: `"all"`, one name, or several.
        intervention: what is done to a family; `"mask"`.
        length: tokens of a window, each inside one document.
        documents_pilot, documents_confirm: most documents per split.
        windows_per_document: most windows of one document; they are averaged before any test.
        batch_size: windows a forward pass.
        seed: chooses documents and offsets.
        schedules: how the vanilla baseline is wrapped.
        recency_bias: bias b of the recency wrap, in nats.
        bias: `"stored"` or `"init"`: which routing biases of a released checkpoint are used.
    """

    families: str | tuple[str, ...] = "all"
    sublayers: str | tuple[str, ...] = "all"
    bands: str | tuple[str, ...] = "all"
    intervention: Literal["mask"] = "mask"
    length: int = 128
    documents_pilot: int = 32
    documents_confirm: int = 96
    windows_per_document: int = 1
    batch_size: int = 16
    seed: int = 0
    schedules: tuple[Literal["recency", "uniform"], ...] = ("recency", "uniform")
    recency_bias: float = 10.0
    bias: Literal["stored", "init"] = "stored"

    def __post_init__(self) -> None:
        for key, known in (("families", FAMILIES), ("sublayers", SUBLAYERS), ("bands", BANDS)):
            object.__setattr__(self, key, _names(getattr(self, key), known, key))
        for key in ("length", "documents_pilot", "documents_confirm", "windows_per_document", "batch_size"):
            require(getattr(self, key) >= 1, f"probe.{key}: expected at least 1, received {getattr(self, key)}")
        require(self.seed >= 0, f"probe.seed: expected 0 or more, received {self.seed}")
        require(bool(self.schedules), "probe.schedules: expected recency, uniform or both, received none")


@dataclass(frozen=True)
class ProbeConfig:
    """One probe.

    Attributes:
        ckpt: what is probed; see `attnres.model.loading.model_folder`. A run may be named without its hash.
        baseline: a vanilla Qwen3, or None to look for the matching run beside the checkpoint.
        data: keys of `DataConfig` that differ from the checkpoint's; for a released checkpoint, which text to read.
        runs_dir: where the probe's folder goes.
        cache_dir: where token shards are cached.
        device: `"auto"`, `"cpu"` or `"cuda"`.
        threads: of torch; None leaves its own choice.
        debug: show tracebacks.
    """

    ckpt: str
    baseline: str | None = None
    data: dict[str, Any] = field(default_factory=dict)
    runs_dir: str = "runs"
    cache_dir: str = "cache"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = None
    debug: bool = False
    probe: GridConfig = field(default_factory=GridConfig)
    statistics: StatisticsConfig = field(default_factory=StatisticsConfig)


def config_hash(config: ProbeConfig, models: list[str]) -> str:
    """Eight hex digits of what is measured on which weights; `models` are the digests of the checkpoints."""
    plain = {key: value for key, value in to_plain(config).items() if key not in EXECUTION_KEYS}
    canonical = json.dumps([plain, models], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:8]

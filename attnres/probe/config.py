"""What a probe is made of, frozen and validated, and the hash that names its folder.

Keys that are not `hashed` say where and how a probe executes, not what it measures.
"""

from dataclasses import dataclass
from typing import Any, Literal

from attnres.config import decisive, key, require, to_plain
from attnres.files.hashes import content_hash
from attnres.interventions.config import GridConfig
from attnres.statistics.config import StatisticsConfig


@dataclass(frozen=True)
class ProbeConfig:
    """One probe.

    Attributes:
        ckpt: what is probed; see `attnres.model.locate.model_folder`. A run may be named without its hash.
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
    data: dict[str, Any] = key(dict)
    runs_dir: str = key("runs", hashed=False)
    cache_dir: str = key("cache", hashed=False)
    device: Literal["auto", "cpu", "cuda"] = key("auto", hashed=False)
    devices: int = key(1, hashed=False)
    threads: int | None = key(None, hashed=False)
    debug: bool = key(False, hashed=False)
    probe: GridConfig = key(GridConfig)
    statistics: StatisticsConfig = key(StatisticsConfig)

    def __post_init__(self) -> None:
        require(self.devices >= 1, f"devices: expected at least 1, received {self.devices}")
        for name, path in self.controls.items() if isinstance(self.controls, dict) else ():
            require(isinstance(path, str), f"controls.{name}: expected a path, received {path!r}")


def config_hash(config: ProbeConfig, models: list[str]) -> str:
    """Eight hex digits of what is measured on which weights; `models` are the digests of the checkpoints."""
    plain = decisive(ProbeConfig, to_plain(config))
    # A key of data sets that came later, where it asks for nothing, moves no folder.
    if "data" in plain and plain["data"].get("suffixes") == []:
        plain["data"] = {name: value for name, value in plain["data"].items() if name != "suffixes"}
    return content_hash([plain, models])[:8]

"""Text to token windows: text/ -> corpus/ -> windows/, and `preparation`, which opens, builds or mixes corpora.

Its public names are loaded when they are first used: the configuration alone loads neither torch nor Lightning.
"""

import importlib
from typing import TYPE_CHECKING, Any

from attnres.data.config import SPLITS, DataConfig

if TYPE_CHECKING:
    from attnres.data.corpus.folder import Corpus, open_corpus
    from attnres.data.preparation import prepare
    from attnres.data.windows.datamodule import TextDataModule
    from attnres.data.windows.pieces import documents_in_step
    from attnres.data.windows.sampler import BatchSampler, Order, accumulation_steps
    from attnres.data.windows.windows import NO_TARGET, ProbeWindows, WindowDataset, probe_windows

__all__ = [
    "NO_TARGET",
    "SPLITS",
    "BatchSampler",
    "Corpus",
    "DataConfig",
    "Order",
    "ProbeWindows",
    "TextDataModule",
    "WindowDataset",
    "accumulation_steps",
    "documents_in_step",
    "open_corpus",
    "prepare",
    "probe_windows",
]

_HOMES = {
    "corpus.folder": ("Corpus", "open_corpus"),
    "preparation": ("prepare",),
    "windows.datamodule": ("TextDataModule",),
    "windows.pieces": ("documents_in_step",),
    "windows.sampler": ("BatchSampler", "Order", "accumulation_steps"),
    "windows.windows": ("NO_TARGET", "ProbeWindows", "WindowDataset", "probe_windows"),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""Text to token windows: sources, tokenizer, shards, the stateless order of training, probe windows."""

from attnres.data.config import SPLITS, DataConfig
from attnres.data.corpus.build import prepare
from attnres.data.corpus.corpus import Corpus, open_corpus
from attnres.data.windows.datamodule import TextDataModule, documents_in_step
from attnres.data.windows.sampler import BatchSampler, accumulation_steps, global_batch
from attnres.data.windows.windows import NO_TARGET, ProbeWindows, WindowDataset, probe_windows

__all__ = [
    "NO_TARGET",
    "SPLITS",
    "BatchSampler",
    "Corpus",
    "DataConfig",
    "ProbeWindows",
    "TextDataModule",
    "WindowDataset",
    "accumulation_steps",
    "documents_in_step",
    "global_batch",
    "open_corpus",
    "prepare",
    "probe_windows",
]

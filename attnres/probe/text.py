"""The text of a probe: the corpus of the checkpoint, and the windows that are drawn from its two splits."""

from collections.abc import Mapping
from dataclasses import dataclass

from attnres.config import build
from attnres.data import Corpus, DataConfig, ProbeWindows, prepare, probe_windows
from attnres.errors import ConfigError, DataError
from attnres.model.locate import Located
from attnres.probe.config import ProbeConfig
from attnres.processes.ranks import Ranks
from attnres.tables.names import Split


@dataclass(frozen=True)
class ProbeText:
    """What all models of a probe read.

    Attributes:
        corpus: turns ids into text, documents into names.
        windows: split -> windows; the pilot's first.
    """

    corpus: Corpus
    windows: Mapping[str, ProbeWindows]

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """Documents and windows per split."""
        return {
            "documents": {split: len(set(drawn.document_ids.tolist())) for split, drawn in self.windows.items()},
            "windows": {split: len(drawn) for split, drawn in self.windows.items()},
        }


def probe_text(config: ProbeConfig, trained: Located, ranks: Ranks) -> ProbeText:
    """The checkpoint's splits, or those of the text that the configuration names.

    Raises:
        ConfigError: the checkpoint does not say what it was trained on, and the configuration names no text.
        DataError: no windows, or other splits than the checkpoint's: they would hold documents that it was trained on.
    """
    corpus = _corpus(_data_config(config, trained), ranks)
    stored = trained.data.get("fingerprint")
    if stored and not config.data and stored != corpus.fingerprint:
        raise DataError(
            f"data: the text that {trained.run} was trained on is not the text found now ({stored[:8]} against "
            f"{corpus.fingerprint[:8]}; another Python or other packages?); probe where it was trained, or name other "
            "text with data="
        )
    grid = config.probe
    windows = {
        str(split): probe_windows(
            corpus,
            f"probe_{split}",
            grid.length,
            max_documents=documents,
            windows_per_document=grid.windows_per_document,
            seed=grid.seed,
        )
        for split, documents in ((Split.PILOT, grid.documents_pilot), (Split.CONFIRM, grid.documents_confirm))
    }
    return ProbeText(corpus, windows)


def _data_config(config: ProbeConfig, trained: Located) -> DataConfig:
    """The corpus of the checkpoint, with the keys that the probe overrides."""
    stored = dict(trained.data.get("config", {}))
    if not stored and not config.data:
        raise ConfigError(
            f"data: {trained.folder} does not say which text it was trained on; name one, e.g. data=pystdlib"
        )
    merged = stored | config.data | {"cache_dir": config.cache_dir}
    if not stored and merged.get("tokenizer") is None:
        merged["tokenizer"] = str(trained.folder)
    return build(DataConfig, merged, "data")


def _corpus(config: DataConfig, ranks: Ranks) -> Corpus:
    """The corpus; the first process makes it if need be, and the others then find it."""
    corpus = prepare(config) if ranks.rank == 0 else None
    ranks.agree()
    return corpus or prepare(config)

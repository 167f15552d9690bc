"""What decides a corpus and how it is cut into windows."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from attnres.config import key
from attnres.errors import ConfigError

SOURCES = ("pystdlib", "pyenv", "files", "prepared")
SPLITS = ("train", "validation", "probe_pilot", "probe_confirm")

# 256 bytes and the end-of-text token: a byte-level vocabulary cannot be smaller.
MIN_VOCAB_SIZE = 257


@dataclass(frozen=True)
class DataConfig:
    """Text, tokenizer, splits and window length; every field is checked on construction.

    Attributes:
        source: "pystdlib" (the interpreter's standard library), "pyenv" (the installed packages), "files", or
            "prepared" (folders of token shards). The splits and the tokenizer of a prepared folder were decided when
            it was made.
        paths: For "files": files, folders of them, or globs; `attnres/data/README.md` lists what is read. For
            "prepared": folders that `python -m attnres.commands.make_shards` or an earlier run made.
        suffixes: For "files": which files of a folder are read, such as (".md", ".py"); those of no format known here
            are text. None given: the known formats.
        weights: Shares of the training windows that come from each of several prepared folders; they are made to sum
            to 1.
        text_column: For "files": the field of a row (JSON, CSV, parquet) that holds the text.
        vocab_size: Most entries of the byte-level BPE that is trained on the train split.
        tokenizer: A `tokenizer.json`, or a folder holding one, to use instead of training; then
            `vocab_size` is ignored. With "prepared": the tokenizer that the folders must have.
        sequence_length: Tokens in one training window.
        isolate_documents: Restart positions at each document and drop targets that cross into another.
        seed: Decides the split of each document and the order of the training windows.
        validation: Expected fraction of documents in the validation split.
        probe_pilot: Expected fraction of documents from which a probe picks hypotheses.
        probe_confirm: Expected fraction of documents on which a probe tests them; the rest is "train".
        cache_dir: Folder that holds the prepared corpora.
        max_bytes: Read documents, in source order, only while their UTF-8 text stays within this many bytes.
        obtain: Command that makes missing files; it is shown, never run.

    Raises:
        ConfigError: A field has an impossible value.
    """

    source: str = "pystdlib"
    paths: tuple[str, ...] = ()
    # A run on one set keeps the name that it had before sets could be mixed.
    weights: tuple[float, ...] = key((), as_before=())
    suffixes: tuple[str, ...] = key((), as_before=())
    text_column: str = "text"
    vocab_size: int = 2048
    tokenizer: str | None = None
    sequence_length: int = 128
    isolate_documents: bool = False
    seed: int = 0
    validation: float = 0.04
    probe_pilot: float = 0.08
    probe_confirm: float = 0.20
    cache_dir: str = key("cache", hashed=False)
    max_bytes: int | None = None
    obtain: str | None = key(None, hashed=False)

    def __post_init__(self) -> None:
        if isinstance(self.paths, str) or not isinstance(self.paths, Sequence):
            raise ConfigError(f"data.paths: expected a list, got {self.paths!r}; write [{self.paths}]")
        object.__setattr__(self, "paths", tuple(str(path) for path in self.paths))
        if self.source not in SOURCES:
            raise ConfigError(f"data.source: expected one of {', '.join(SOURCES)}, got {self.source!r}")
        if self.source in ("files", "prepared") and not self.paths:
            raise ConfigError("data.paths: expected at least one path, got none; name the files or folders to read")
        if self.source not in ("files", "prepared") and self.paths:
            raise ConfigError(
                f"data.paths: expected none with data.source={self.source}, got {list(self.paths)}; "
                "set data.source=files or prepared to read them"
            )
        self._check_suffixes()
        self._check_weights()
        self._check_integer("vocab_size", MIN_VOCAB_SIZE)
        self._check_integer("sequence_length", 1)
        self._check_integer("seed", 0)
        if self.max_bytes is not None:
            self._check_integer("max_bytes", 1)
        for name in SPLITS[1:]:
            fraction = getattr(self, name)
            if not isinstance(fraction, float) or not 0 < fraction < 1:
                raise ConfigError(f"data.{name}: expected a fraction between 0 and 1, got {fraction!r}")
        if (held_out := sum(self.held_out)) >= 1:
            raise ConfigError(
                "data.validation + data.probe_pilot + data.probe_confirm: expected less than 1, got "
                f"{held_out:g}; lower one, so that documents are left to train on"
            )

    @property
    def held_out(self) -> tuple[float, ...]:
        """Fractions of the splits that are not trained on, in the order of `SPLITS[1:]`."""
        return tuple(getattr(self, name) for name in SPLITS[1:])

    def _check_suffixes(self) -> None:
        if isinstance(self.suffixes, str) or not isinstance(self.suffixes, Sequence):
            raise ConfigError(f"data.suffixes: expected a list, got {self.suffixes!r}; write [{self.suffixes}]")
        object.__setattr__(self, "suffixes", tuple(str(suffix).lower() for suffix in self.suffixes))
        if self.suffixes and self.source != "files":
            raise ConfigError(f"data.suffixes: expected none with data.source={self.source}; leave it out")
        for suffix in self.suffixes:
            if not re.fullmatch(r"\.[^./\s]+", suffix):
                raise ConfigError(f"data.suffixes: expected endings such as .md, got {suffix!r}")

    def _check_weights(self) -> None:
        object.__setattr__(self, "weights", tuple(self.weights))
        expected = len(self.paths) if self.source == "prepared" and len(self.paths) > 1 else 0
        if len(self.weights) != expected:
            raise ConfigError(
                f"data.weights: expected {expected} (one for each of several prepared folders), got {len(self.weights)}"
            )
        if not all(isinstance(weight, int | float) and 0 < weight < float("inf") for weight in self.weights):
            raise ConfigError(f"data.weights: expected numbers above 0, got {list(self.weights)}; leave a folder out")

    def _check_integer(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ConfigError(f"data.{name}: expected an integer of at least {least}, got {value!r}")

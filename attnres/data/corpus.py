"""A prepared corpus on disk: token shards, document boundaries, tokenizer, manifest.

Layout:
    <cache_dir>/<source>-<key>/
      manifest.json         counts, versions, fingerprint, digest of every other file
      tokenizer.json        byte-level BPE
      documents.parquet     a row per document: name, split, start and tokens in the split's shard, group
      <split>.tokens        ids of the split's documents, each followed by the end-of-text id
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from tokenizers import Tokenizer

from attnres.data.config import SPLITS
from attnres.data.shards import check_file, open_tokens, token_dtype
from attnres.data.tokenizer import load_tokenizer
from attnres.errors import ConfigError, DataError

# Corpora below this size are read in full when opened, in well under a second; of larger ones only the sizes
# of the files are checked.
VERIFY_BYTES = 256 * 1024**2

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
DOCUMENTS = "documents.parquet"
# A change to the layout of these files, or to how documents are grouped and split, needs a new number.
FORMAT = 1


@dataclass(frozen=True)
class Corpus:
    """Tokenised documents in four splits. Document ids are `0 .. N-1` over all splits.

    Attributes:
        path: The corpus' folder.
        manifest: Contents of `manifest.json`.
    """

    path: Path
    manifest: Mapping[str, Any] = field(repr=False)

    @property
    def fingerprint(self) -> str:
        """sha256 over token shards, document boundaries, splits and tokenizer; no paths or versions."""
        return self.manifest["fingerprint"]

    @property
    def vocab_size(self) -> int:
        """Ids are below this."""
        return self.manifest["vocab_size"]

    @property
    def eos_id(self) -> int:
        """Id that ends each document."""
        return self.manifest["eos_id"]

    @property
    def tokenizer_path(self) -> Path:
        """The `tokenizer.json` of this corpus."""
        return self.path / TOKENIZER

    @property
    def tokenizer_sha256(self) -> str:
        """sha256 of `tokenizer.json`."""
        return self.manifest["files"][TOKENIZER]["sha256"]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Turns ids into text and back."""
        return load_tokenizer(self.tokenizer_path)

    @cached_property
    def _table(self) -> dict[str, NDArray[Any]]:
        table = pq.read_table(self.path / DOCUMENTS)
        return {name: table[name].to_numpy() for name in ("split", "start", "tokens", "group")}

    @cached_property
    def names(self) -> list[str]:
        """Name of each document, by document id."""
        return pq.read_table(self.path / DOCUMENTS, columns=["name"])["name"].to_pylist()

    @property
    def groups(self) -> NDArray[np.int64]:
        """`[N]`: near-duplicate group of each document, named by the lowest id in it."""
        return self._table["group"]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """`[N]`: tokens of each document, the end-of-text id included."""
        return self._table["tokens"]

    @property
    def starts(self) -> NDArray[np.int64]:
        """`[N]`: position of each document's first token in its split's shard."""
        return self._table["start"]

    def documents(self, split: str) -> NDArray[np.int64]:
        """Ids of the documents of a split, in the order of its shard."""
        return np.flatnonzero(self._table["split"] == _split_index(split))

    def tokens(self, split: str) -> NDArray[np.unsignedinteger]:
        """`[tokens]`: ids of a split's documents one after the other, read-only and mapped into memory."""
        _split_index(split)
        return open_tokens(self.path / f"{split}.tokens", token_dtype(self.vocab_size))

    def document_tokens(self, document: int) -> NDArray[np.unsignedinteger]:
        """`[tokens]`: ids of one document, the end-of-text id last."""
        start = self.starts[document]
        return self.tokens(SPLITS[self._table["split"][document]])[start : start + self.lengths[document]]

    def text(self, document: int) -> str:
        """Text of one document."""
        return self.tokenizer.decode(self.document_tokens(document)[:-1].tolist(), skip_special_tokens=False)


def open_corpus(path: Path) -> Corpus:
    """Opens a prepared corpus, checking it against its manifest.

    Sizes are always compared; contents too if the corpus is below `VERIFY_BYTES`.

    Raises:
        DataError: A file is missing, damaged or of another format; the message names it and where.
    """
    remedy = f"delete {path} and run the same command again to rebuild it"
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        intact = manifest["sha256_of_the_rest"] == manifest_sha256(manifest)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path / MANIFEST} is missing or unreadable ({error!r}); {remedy}") from error
    if not intact:
        raise DataError(f"{path / MANIFEST} was changed after it was written; {remedy}")
    if manifest["format"] != FORMAT:
        raise DataError(f"{path / MANIFEST} has format {manifest['format']}, expected {FORMAT}; {remedy}")
    files = manifest["files"]
    contents = sum(entry["bytes"] for entry in files.values()) < VERIFY_BYTES
    for name, entry in files.items():
        check_file(path / name, entry, contents)
    return Corpus(path, manifest)


def manifest_sha256(manifest: Mapping[str, Any]) -> str:
    """sha256 of everything in a manifest but this digest itself."""
    rest = {key: value for key, value in manifest.items() if key != "sha256_of_the_rest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _split_index(split: str) -> int:
    if split not in SPLITS:
        raise ConfigError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
    return SPLITS.index(split)

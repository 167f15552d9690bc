"""The folder of a prepared corpus: token shards, document boundaries, tokenizer, manifest; opened and checked here.

Layout:
    <cache_dir>/<source>-<key>/   or a folder that `make_shards` made
      manifest.json         counts, versions, fingerprint, digest of every other file
      tokenizer.json        byte-level BPE
      documents.parquet     a row per document: name, split, start and tokens in the split's ids, group, and in folders
                            of `make_shards` content (see `Corpus.content`)
      <split>.tokens        ids of the split's documents, each followed by the end-of-text id; `make_shards` writes
                            several files of bounded size, <split>-00000.tokens and so on
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from tokenizers import Tokenizer

from attnres.data.config import SPLITS
from attnres.data.corpus.manifest import DOCUMENTS, MANIFEST, TOKENIZER, read_manifest
from attnres.data.corpus.shards import ShardedTokens, content_key, open_tokens, token_dtype
from attnres.data.corpus.verification import verify_files
from attnres.data.text.tokenizer import load_tokenizer
from attnres.errors import ConfigError, DataError

# Ids of a split that are compared with the vocabulary whenever a corpus is opened: a tenth of a second.
_IDS_CHECKED = 64 * 1024**2


@dataclass(frozen=True)
class Corpus:
    """Tokenised documents in four splits. Document ids are `0 .. N-1` over all splits."""

    path: Path
    manifest: Mapping[str, Any] = field(repr=False)

    def __reduce__(self) -> tuple[Any, ...]:
        # Without what was read since: another process maps the shards itself.
        return type(self), tuple(getattr(self, item.name) for item in fields(self))

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
    def groups(self) -> NDArray[np.int64]:
        """`[N]`: near-duplicate group of each document, named by the lowest id in it."""
        return self._column("group")

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """`[N]`: tokens of each document, the end-of-text id included."""
        return self._column("tokens")

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """`[N]`: position of each document's first token among the ids of its split."""
        return self._column("start")

    @cached_property
    def split_indices(self) -> NDArray[np.int8]:
        """`[N]`: index into `SPLITS` of each document."""
        return self._column("split")

    @cached_property
    def content(self) -> NDArray[np.uint64]:
        """`[N]`: the first 8 bytes of the sha256 of each document's ids; equal for equal texts of one tokenizer."""
        if "content" in pq.read_schema(self.path / DOCUMENTS).names:
            return self._column("content")
        return np.array([content_key(self.document_tokens(i)) for i in range(len(self.lengths))], np.uint64)

    @property
    def names(self) -> list[str]:
        """Name of each document, by document id."""
        return pq.read_table(self.path / DOCUMENTS, columns=["name"])["name"].to_pylist()

    def names_of(self, documents: Sequence[int]) -> list[str]:
        """Names of some documents, reading only the row groups that hold them."""
        names: dict[int, str] = {}
        with pq.ParquetFile(self.path / DOCUMENTS) as table:
            first = 0
            for group in range(table.num_row_groups):
                rows = table.metadata.row_group(group).num_rows
                if wanted := [document for document in documents if first <= document < first + rows]:
                    column = table.read_row_group(group, columns=["name"])["name"]
                    names |= {document: column[document - first].as_py() for document in wanted}
                first += rows
        return [names[document] for document in documents]

    def documents(self, split: str) -> NDArray[np.int64]:
        """Ids of the documents of a split, in the order of its shards."""
        return np.flatnonzero(self.split_indices == split_index(split))

    def tokens(self, split: str) -> NDArray[np.unsignedinteger] | ShardedTokens:
        """`[tokens]`: ids of a split's documents one after the other, read-only and mapped into memory."""
        return open_tokens(self.shards(split), token_dtype(self.vocab_size))

    def shards(self, split: str) -> list[Path]:
        """Files that hold a split's ids, in order."""
        split_index(split)
        return [self.path / name for name in self.manifest["splits"][split].get("shards", [f"{split}.tokens"])]

    def document_tokens(self, document: int) -> NDArray[np.unsignedinteger]:
        """`[tokens]`: ids of one document, the end-of-text id last."""
        start = self.starts[document]
        return self._opened[self.split_indices[document]][start : start + self.lengths[document]]

    def text(self, document: int) -> str:
        """Text of one document."""
        return self.tokenizer.decode(self.document_tokens(document)[:-1].tolist(), skip_special_tokens=False)

    @cached_property
    def _opened(self) -> list[NDArray[np.unsignedinteger] | ShardedTokens]:
        return [self.tokens(split) for split in SPLITS]

    def _column(self, name: str) -> NDArray[Any]:
        return pq.read_table(self.path / DOCUMENTS, columns=[name])[name].to_numpy()


def open_corpus(path: Path) -> Corpus:
    """Opens a prepared corpus, after checking its files against its manifest and its splits for leaks.

    Raises:
        DataError: A file is missing, damaged or of another format; the message names it and where. Or a document could
            be trained on and held out.
    """
    manifest, remedy = read_manifest(path)
    verify_files(path, manifest["files"], remedy)
    corpus = Corpus(path, manifest)
    check_ids(corpus, remedy)
    check_no_leak(corpus, remedy)
    return corpus


def check_ids(corpus: Corpus, remedy: str) -> None:
    """Ids of a small corpus are below its vocabulary, which is what its type can hold; of a large one, the first are.

    Raises:
        DataError: One is not, and would index past the model's embedding.
    """
    if not 0 < corpus.vocab_size < 2**31:
        raise DataError(f"{corpus.path / MANIFEST}: a vocabulary of {corpus.vocab_size:,} entries; {remedy}")
    for split in SPLITS:
        ids = corpus.tokens(split)[:_IDS_CHECKED]
        if len(ids) and (largest := int(np.max(ids))) >= corpus.vocab_size:
            raise DataError(
                f"{corpus.path}: split {split} holds the id {largest}, the vocabulary {corpus.vocab_size}; {remedy}"
            )


def check_no_leak(corpus: Corpus, remedy: str) -> None:
    """No group of near-duplicates lies in two splits, and no window of one split can reach into another.

    Windows are cut from a split's ids, so the second holds if these are exactly its documents, end to end. A tenth of
    a second for a million documents.

    Raises:
        DataError: One of the two does not hold; the message names the documents.
    """
    splits = corpus.split_indices
    # A group is named by its lowest document.
    astray = np.flatnonzero(splits != splits[corpus.groups])
    if len(astray):
        pair = [int(astray[0]), int(corpus.groups[astray[0]])]
        first, second = corpus.names_of(pair)
        raise DataError(
            f"data leak in {corpus.path}: {first} is in split {SPLITS[splits[pair[0]]]}, its near-duplicate {second} "
            f"in {SPLITS[splits[pair[1]]]} ({len(astray)} such documents); {remedy}"
        )
    for split in SPLITS:
        documents = corpus.documents(split)
        ends = np.cumsum(corpus.lengths[documents])
        size = sum(path.stat().st_size for path in corpus.shards(split)) // token_dtype(corpus.vocab_size).itemsize
        if not np.array_equal(corpus.starts[documents], ends - corpus.lengths[documents]):
            raise DataError(f"data leak in {corpus.path}: documents of split {split} overlap or leave gaps; {remedy}")
        if size != (ends[-1] if len(ends) else 0):
            raise DataError(
                f"data leak in {corpus.path}: the shards of split {split} hold {size} ids, its documents "
                f"{ends[-1] if len(ends) else 0}; {remedy}"
            )


def split_index(split: str) -> int:
    """Position of a split's name in `SPLITS`.

    Raises:
        ConfigError: It is not the name of one.
    """
    if split not in SPLITS:
        raise ConfigError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
    return SPLITS.index(split)

"""Fixed-length windows of tokens: a training window may cross documents, a probe window never does."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from attnres.data.corpus.folder import Corpus
from attnres.errors import ConfigError, DataError

# The loss ignores positions with this label.
NO_TARGET = -100


class WindowDataset(Dataset[dict[str, Any]]):
    """The windows of a split: its documents one after the other, cut every `length` tokens.

    Item `i` holds tokens `i * length` to `(i + 1) * length` inclusive: `input_ids [T]` without the last,
    `labels [T]` without the first (already shifted), `sample_ids` = i. With `isolate_documents`, also
    `position_ids [T]`, which restart at each document, and no target that belongs to another document than
    its input.

    Args:
        length: T, tokens in one window.
    """

    def __init__(self, corpus: Corpus, split: str, length: int, isolate_documents: bool = False) -> None:
        self._arguments = (corpus, split, length, isolate_documents)
        self._length = length
        self._isolate_documents = isolate_documents
        self._tokens = corpus.tokens(split)

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker that is spawned opens the shard itself; pickling a memory map would copy it.
        return type(self), self._arguments

    @cached_property
    def _documents(self) -> NDArray[np.int64]:
        corpus, split, *_ = self._arguments
        return corpus.documents(split)

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        return self._arguments[0].starts[self._documents]

    def __len__(self) -> int:
        return max(0, (len(self._tokens) - 1) // self._length)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        first = index * self._length
        window = self._tokens[first : first + self._length + 1].astype(np.int64)
        labels = window[1:].copy()
        item: dict[str, Any] = {"input_ids": torch.from_numpy(window[:-1]), "sample_ids": index}
        if self._isolate_documents:
            positions = np.arange(self._length)
            # Where documents begin within the inputs and targets, as positions in the window.
            begin, end = np.searchsorted(self._starts, [first + 1, first + self._length + 1])
            for start in self._starts[begin:end] - first:
                labels[start - 1] = NO_TARGET
                positions[start:] = np.arange(self._length - start)
            item["position_ids"] = torch.from_numpy(positions)
        item["labels"] = torch.from_numpy(labels)
        return item

    def documents(self, index: int) -> NDArray[np.int64]:
        """Ids of the documents that any input or target of window `index` belongs to."""
        first = index * self._length
        begin, end = np.searchsorted(self._starts, [first, first + self._length], side="right")
        return self._documents[begin - 1 : end]


@dataclass(frozen=True)
class ProbeWindows:
    """Windows to probe on, all of one length, each inside one document.

    Attributes:
        input_ids: `[N, length]` int64.
        labels: `[N, length]` int64, the token after each input.
        window_ids: `[N]` int64, position of each window's first token in the shard of its split.
        document_ids: `[N]` int64.
    """

    input_ids: Tensor
    labels: Tensor
    window_ids: Tensor
    document_ids: Tensor

    def __len__(self) -> int:
        return len(self.window_ids)


def probe_windows(
    corpus: Corpus,
    split: str,
    length: int,
    max_documents: int | None = None,
    windows_per_document: int = 1,
    seed: int = 0,
) -> ProbeWindows:
    """Draws windows for a probe; the same arguments always draw the same ones.

    Documents come in an order that depends on the seed alone, one per group of near-duplicates, because the
    statistics take documents for independent. Each gives up to `windows_per_document` windows that share no
    input and no target, at offsets that depend on the seed and the document. A cap keeps the first of that
    order, so a smaller probe is the beginning of a larger one.

    Args:
        length: Tokens in one window; its document needs `length + 1`, the end-of-text id included.

    Raises:
        ConfigError: A number is not positive, or the split is not one.
        DataError: No document of the split is long enough.
    """
    numbers = {"length": length, "max_documents": max_documents, "windows_per_document": windows_per_document}
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise ConfigError(f"{name}: expected at least 1, got {number}")
    documents = corpus.documents(split)
    lengths = corpus.lengths[documents]
    long_enough = documents[lengths > length]
    if not len(long_enough):
        raise DataError(
            f"data: none of the {len(documents)} documents of split {split} has the {length + 1} tokens that "
            f"a window of {length} needs (the longest has {lengths.max()}; {(lengths > length // 2).sum()} "
            f"have {length // 2 + 1} or more); lower the window length or give more text"
        )
    order = np.argsort(_raw(len(corpus.lengths), seed)[long_enough], kind="stable")
    chosen = long_enough[order]
    _, first_of_group = np.unique(corpus.groups[chosen], return_index=True)
    chosen = chosen[np.sort(first_of_group)][:max_documents]

    starts: list[int] = []
    owners: list[int] = []
    for document in chosen.tolist():
        offsets = _offsets(int(corpus.lengths[document]), length, windows_per_document, seed, document)
        starts += [int(corpus.starts[document]) + offset for offset in offsets]
        owners += [document] * len(offsets)
    window_ids = np.array(starts, np.int64)
    tokens = corpus.tokens(split)
    windows = torch.from_numpy(tokens[window_ids[:, None] + np.arange(length + 1)].astype(np.int64))
    return ProbeWindows(
        input_ids=windows[:, :-1].contiguous(),
        labels=windows[:, 1:].contiguous(),
        window_ids=torch.from_numpy(window_ids),
        document_ids=torch.tensor(owners, dtype=torch.int64),
    )


def _offsets(tokens: int, length: int, most: int, seed: int, document: int) -> list[int]:
    """Starts of up to `most` windows in a document; the tokens left over fall before, between and after."""
    count = min(most, (tokens - 1) // length)
    slack = tokens - 1 - count * length
    gaps = np.sort(_raw(count, seed, document) % np.uint64(slack + 1)).astype(np.int64)
    return (gaps + length * np.arange(count)).tolist()


def _raw(count: int, *key: int) -> NDArray[np.uint64]:
    """Random bits whose stream is promised to be the same in every numpy."""
    return np.random.PCG64(np.random.SeedSequence(list(key))).random_raw(count)

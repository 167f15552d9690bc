"""Several prepared corpora as one, and the order in which their windows are mixed: a pure function of the position.

The sets' ids are one long sequence, so that document ids, window ids and probes work as for one corpus. Training draws
from the sets by weight: positions come in rounds of `ROUND`, each round has the same number of positions of every set,
and where they fall in it is a permutation that depends on the seed and the round. How often a set was drawn before some
position therefore follows from the position alone, and each set walks through permutations of its own windows, one per
epoch of that set.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from attnres.data.config import SPLITS
from attnres.data.corpus.folder import Corpus
from attnres.data.corpus.manifest import TOKENIZER
from attnres.data.corpus.shards import ShardedTokens, token_dtype
from attnres.data.windows.order import permutation
from attnres.errors import ConfigError, DataError

# Weights are rounded to multiples of 1 / ROUND.
ROUND = 4096


@dataclass(frozen=True)
class Mix:
    """Which windows belong to which set, and how often each set is drawn.

    Attributes:
        first: The first window id of each set.
        count: Windows of each set.
        quota: Positions of each set in a round; they sum to `ROUND`.
    """

    first: tuple[int, ...]
    count: tuple[int, ...]
    quota: tuple[int, ...]

    def ids(self, positions: range, seed: int) -> NDArray[np.int64]:
        """Window ids at consecutive `positions` of the run, which count samples from 0: `[len(positions)]`."""
        owner, drawn = self._draws(positions, seed)
        ids = np.empty(len(positions), np.int64)
        for index, (first, count) in enumerate(zip(self.first, self.count, strict=True)):
            mine = owner == index
            epochs, places = np.divmod(drawn[mine], count)
            drawn_ids = np.empty(len(places), np.int64)
            for epoch in np.unique(epochs).tolist():
                now = epochs == epoch
                drawn_ids[now] = first + permutation(count, seed, epoch, 2 + index)[places[now]]
            ids[mine] = drawn_ids
        return ids

    def in_order(self) -> NDArray[np.int64]:
        """Window ids for validation: mixed by weight, each set in its own order, until one is exhausted."""
        positions = range(sum(self.count))
        owner, drawn = self._draws(positions, seed=0)
        exhausted = np.flatnonzero(drawn >= np.array(self.count)[owner])
        end = exhausted[0] if len(exhausted) else len(positions)
        return np.array(self.first)[owner[:end]] + drawn[:end]

    def check_batch(self, global_batch_size: int) -> None:
        """A set must not repeat within one global batch.

        Raises:
            DataError: Some set has fewer windows than are drawn from it for one batch.
        """
        for index, (count, quota) in enumerate(zip(self.count, self.quota, strict=True)):
            needed = -(-global_batch_size * quota // ROUND)
            if count < needed:
                raise DataError(
                    f"data: data.paths[{index}] has {count} training windows, and a global batch of "
                    f"{global_batch_size} draws {needed} from it; lower its weight or give it more text"
                )

    def _draws(self, positions: range, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """For each position the set that it draws from, and how many were drawn from that set before it."""
        rounds = range(positions.start // ROUND, -(-positions.stop // ROUND))
        quota = np.array(self.quota)
        owners, drawn = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for number in rounds:
            owner, before = _round(self.quota, seed, number)
            owners.append(owner)
            drawn.append(number * quota[owner] + before)
        start = positions.start - rounds.start * ROUND
        window = slice(start, start + len(positions))
        return np.concatenate(owners)[window], np.concatenate(drawn)[window]


@lru_cache(maxsize=4)
def _round(quota: tuple[int, ...], seed: int, number: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The set of each position of a round, and how many positions of that set come before it in the round."""
    owner = np.repeat(np.arange(len(quota)), quota)[permutation(ROUND, seed, number, 1)]
    before = np.empty(ROUND, np.int64)
    for index, count in enumerate(quota):
        before[owner == index] = np.arange(count)
    return owner, before


def quotas(weights: Sequence[float]) -> tuple[int, ...]:
    """Positions of each set in a round: `ROUND` in the proportion of the weights, by largest remainder.

    Raises:
        ConfigError: A weight is too small to be drawn at all.
    """
    exact = np.array(weights, float) / sum(weights) * ROUND
    rounded = np.floor(exact).astype(int)
    missing = ROUND - rounded.sum()
    rounded[np.argsort(rounded - exact, kind="stable")[:missing]] += 1
    for index, quota in enumerate(rounded.tolist()):
        if quota < 1:
            raise ConfigError(
                f"data.weights[{index}]: expected at least 1/{ROUND} of their sum, got {weights[index]}; raise it or "
                "leave that folder out"
            )
    return tuple(rounded.tolist())


@dataclass(frozen=True)
class Mixture(Corpus):
    """Several corpora of one tokenizer as one: documents and ids of the first, then of the second, and so on.

    Attributes:
        weights: Share of the training windows that each gives, up to a common factor.
    """

    corpora: tuple[Corpus, ...] = ()
    weights: tuple[float, ...] = ()

    def names_of(self, documents: Sequence[int]) -> list[str]:
        """Names of some documents."""
        names: dict[int, str] = {}
        for corpus, first in zip(self.corpora, self._first_documents, strict=True):
            mine = [document for document in documents if 0 <= document - first < len(corpus.lengths)]
            names |= dict(zip(mine, corpus.names_of([document - first for document in mine]), strict=True))
        return [names[document] for document in documents]

    @property
    def names(self) -> list[str]:
        """Name of each document, by document id."""
        return [name for corpus in self.corpora for name in corpus.names]

    @cached_property
    def content(self) -> NDArray[np.uint64]:
        """See `Corpus.content`."""
        return np.concatenate([corpus.content for corpus in self.corpora])

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Turns ids into text and back."""
        return self.corpora[0].tokenizer

    def tokens(self, split: str) -> NDArray[np.unsignedinteger] | ShardedTokens:
        """`[tokens]`: ids of a split, set after set."""
        shards: list[Any] = [corpus.tokens(split) for corpus in self.corpora]
        shards = [shard for shard in shards if len(shard)]
        if len(shards) > 1:
            return ShardedTokens(shards)
        return shards[0] if shards else np.empty(0, token_dtype(self.vocab_size))

    def mix(self, split: str, length: int) -> Mix:
        """The windows of `length` tokens of a split, by set: a window belongs to the set of its first token.

        Raises:
            DataError: A set has none.
        """
        ends = np.cumsum([corpus.manifest["splits"][split]["tokens"] for corpus in self.corpora])
        # The last token of a split is only ever a target.
        windows = max(0, (int(ends[-1]) - 1) // length)
        edges = [0, *(min(windows, -(-int(end) // length)) for end in ends[:-1]), windows]
        for index, (start, stop) in enumerate(zip(edges, edges[1:], strict=False)):
            if start == stop:
                raise DataError(
                    f"data: {self.corpora[index].path} has no window of {length} tokens in split {split}; leave it out "
                    "or lower data.sequence_length"
                )
        counts = [stop - start for start, stop in zip(edges, edges[1:], strict=False)]
        return Mix(tuple(edges[:-1]), tuple(counts), quotas(self.weights))

    def _column(self, name: str) -> NDArray[Any]:
        columns = [corpus._column(name).copy() for corpus in self.corpora]
        if name == "group":
            columns = [column + first for column, first in zip(columns, self._first_documents, strict=True)]
        if name == "start":
            for split in range(len(SPLITS)):
                before = 0
                for column, corpus in zip(columns, self.corpora, strict=True):
                    column[corpus.split_indices == split] += before
                    before += corpus.manifest["splits"][SPLITS[split]]["tokens"]
        return np.concatenate(columns)

    @cached_property
    def _first_documents(self) -> list[int]:
        return np.cumsum([0, *(len(corpus.lengths) for corpus in self.corpora[:-1])]).tolist()


def mixture(corpora: Sequence[Corpus], weights: Sequence[float]) -> Mixture:
    """Joins corpora.

    Raises:
        ConfigError: A weight is too small.
        DataError: The tokenizers differ, or a document of a training split is held out in another corpus.
    """
    quotas(weights)
    first = corpora[0]
    for corpus in corpora[1:]:
        if (corpus.tokenizer_sha256, corpus.eos_id) != (first.tokenizer_sha256, first.eos_id):
            raise DataError(
                f"data.paths: {corpus.path} has tokenizer {corpus.tokenizer_sha256[:8]}, {first.path} has "
                f"{first.tokenizer_sha256[:8]}; prepare them with the same one"
            )
    splits = {
        split: {
            key: sum(corpus.manifest["splits"][split][key] for corpus in corpora) for key in ("documents", "tokens")
        }
        for split in SPLITS
    }
    manifest = {
        "fingerprint": hashlib.sha256("".join(corpus.fingerprint for corpus in corpora).encode()).hexdigest(),
        "vocab_size": first.vocab_size,
        "eos_id": first.eos_id,
        "documents": sum(corpus.manifest["documents"] for corpus in corpora),
        "splits": splits,
        "files": {TOKENIZER: first.manifest["files"][TOKENIZER]},
    }
    mixed = Mixture(first.path, manifest, tuple(corpora), tuple(weights))
    _check_no_leak_between(mixed)
    return mixed


def _check_no_leak_between(mixed: Mixture) -> None:
    """No text that is held out in one set is trained on, or held out for another purpose, in another set."""
    for split in SPLITS[1:]:
        ids = mixed.documents(split)
        held_out = np.unique(mixed.content[ids])
        astray = np.flatnonzero(np.isin(mixed.content, held_out) & (mixed.split_indices != SPLITS.index(split)))
        if len(astray):
            here = int(ids[mixed.content[ids] == mixed.content[astray[0]]][0])
            first, second = mixed.names_of([int(astray[0]), here])
            raise DataError(
                f"data leak between data.paths: {first} is in split {SPLITS[mixed.split_indices[astray[0]]]} of one "
                f"folder and, as {second}, in {split} of another ({len(astray)} such documents); prepare one with "
                "--exclude and the other's folder"
            )


def mix_of(corpus: Corpus, split: str, length: int) -> Mix | None:
    """How the windows of `length` tokens of a split are mixed, or None for a corpus that is no mixture."""
    return corpus.mix(split, length) if isinstance(corpus, Mixture) else None

"""Looks: the confirmatory documents come in portions, and the level of every test is spent over them.

After each look, what is decided is measured no further; what is open goes on. A test that is read at several looks
would reject too often at its level, so each look has a share of it, by a spending function of the documents measured
so far (Lan and DeMets, Biometrika 70, 1983). The p of a test is the smallest over its looks of p divided by the look's
share: a sequential p (Liu and Anderson, Stat. Med. 27, 2008) that may be corrected like any other, by Holm (Glimm,
Maurer and Bretz, Stat. Med. 29, 2010). The shares are summed without regard to how alike the looks are, so that
nothing rests on a joint distribution; that costs little power and is never anti-conservative.

A sequential p only falls as looks are added, and so does Holm's correction of it: what was rejected stays rejected.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from attnres.statistics.config import StatisticsConfig
from attnres.statistics.inference import Floats, bca_interval, one_sided_p, sign_flip_p

# Share of the level spent when a share t of the documents has been measured.
SPENDING = {
    "linear": lambda t: t,  # the power family of Kim and DeMets (Biometrika 74, 1987) at rho = 1
    "pocock": lambda t: math.log(1 + (math.e - 1) * t),  # Lan and DeMets' Pocock type
}


@dataclass(frozen=True)
class Looks:
    """A plan of looks.

    Attributes:
        documents: after how many documents each look is taken, ascending; the last is all of them.
        shares: of the level, spent at each look; they sum to 1.
    """

    documents: tuple[int, ...]
    shares: tuple[float, ...]

    @classmethod
    def of(cls, documents: Sequence[int], spending: str) -> "Looks":
        """The plan of looks after these numbers of documents, the last being all."""
        spent = [SPENDING[spending](number / documents[-1]) for number in documents]
        return cls(tuple(documents), tuple(np.diff([0.0, *spent]).tolist()) if len(spent) > 1 else (1.0,))

    @classmethod
    def fixed(cls, documents: int) -> "Looks":
        """One look at all documents: the whole level."""
        return cls((documents,), (1.0,))

    def last_within(self, documents: int) -> int:
        """The last look of at most so many documents, counted from 1; the first where none is so early."""
        return max(1, sum(number <= documents for number in self.documents))


def resolved(asked: Sequence[int] | None, documents: int) -> tuple[int, ...] | None:
    """The looks that are asked for among so many documents: those above are left out, and all is the last one."""
    if asked is None:
        return None
    return (*(number for number in asked if number < documents), documents)


@dataclass(frozen=True)
class Sample:
    """Values by document of some columns, each measured up to a look of its own.

    Attributes:
        values: [documents, columns], each column contiguous; NaN at the documents of looks behind the column's last.
        look: [documents], the look at which each document came, from 1.
        shares: of the level, by look.
    """

    values: Floats
    look: NDArray[np.int64]
    shares: tuple[float, ...]

    @cached_property
    def depth(self) -> NDArray[np.int64]:
        """The last look of each column: [columns]; 0 where nothing was measured."""
        measured = np.where(np.isnan(self.values), 0, self.look[:, None])
        return measured.max(axis=0, initial=0)

    @property
    def documents(self) -> NDArray[np.int64]:
        """How many documents each column was measured on: [columns]."""
        return (self.look[:, None] <= self.depth).sum(axis=0)

    def with_values(self, values: Floats) -> "Sample":
        """Other values of the same documents, NaN where one that they are made of is."""
        return Sample(values, self.look, self.shares)

    def minus(self, other: "Sample") -> "Sample":
        """Paired differences, up to the earlier of both last looks."""
        return self.with_values(self.values - other.values)

    def where(self, other: "Sample") -> "Sample":
        """These values at the documents that another sample of the same columns has."""
        return self.with_values(np.where(np.isnan(other.values), np.nan, self.values))

    def first(self, look: int, columns: NDArray[np.int64]) -> Floats:
        """Some columns at the documents of the first looks: [documents, columns], each contiguous."""
        return np.ascontiguousarray(self.values.T[columns][:, self.look <= look]).T

    def by_depth(self) -> Iterator[tuple[float, NDArray[np.int64], Floats]]:
        """The columns of each last look: its share, which columns, and their values at all of their documents."""
        for look in np.unique(self.depth[self.depth > 0]).tolist():
            columns = np.flatnonzero(self.depth == look)
            yield self.shares[look - 1], columns, self.first(look, columns)

    def mean(self) -> Floats:
        """Means over the documents of each column: [columns]."""
        means = np.full(self.values.shape[1], np.nan)
        for _, columns, values in self.by_depth():
            means[columns] = values.mean(axis=0)
        return means

    def interval(self, config: StatisticsConfig) -> tuple[Floats, Floats]:
        """Repeated confidence intervals (Jennison and Turnbull, J. R. Stat. Soc. B 51, 1989): valid at every look.

        Each is a `bca_interval` at its column's last look, at the level that is spent there.
        """
        low, high = np.full((2, self.values.shape[1]), np.nan)
        for share, columns, values in self.by_depth():
            level = 1 - config.alpha * share
            low[columns], high[columns] = bca_interval(values, config.bootstrap, level, config.seed)
        return low, high

    def sign_flip_p(
        self, config: StatisticsConfig, alternative: Literal["two-sided", "greater"] = "two-sided"
    ) -> Floats:
        """`inference.sign_flip_p` over the looks: [columns]."""
        return self._over_looks(
            lambda values, share: sign_flip_p(values, config.flips_at(share), config.seed, alternative)
        )

    def one_sided_p(self, bound: float, alternative: Literal["less", "greater"]) -> Floats:
        """`inference.one_sided_p` over the looks: [columns]."""
        return self._over_looks(lambda values, share: one_sided_p(values, bound, alternative))

    def equivalence_p(self, margin: float) -> Floats:
        """TOST over the looks: the larger of two one-sided p."""
        return np.maximum(self.one_sided_p(-margin, "greater"), self.one_sided_p(margin, "less"))

    def _over_looks(self, test: Callable[[Floats, float], Floats]) -> Floats:
        p = np.where(self.depth > 0, 1.0, np.nan)
        for look, share in enumerate(self.shares, 1):
            columns = np.flatnonzero(self.depth >= look)
            if len(columns):
                p[columns] = np.minimum(p[columns], test(self.first(look, columns), share) / share)
        return p

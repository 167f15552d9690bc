"""Tests and intervals on values by document: arrays in, arrays out.

Every function takes `values` [documents, columns], one value per document (the mean over its windows), and
treats columns separately: what it returns for a column depends on the values in it and on the seed, not on
the order of the documents nor on which other columns are there.
"""

import warnings
from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from statsmodels.stats.multitest import multipletests

from attnres.statistics.config import StatisticsConfig

Floats = NDArray[np.floating]

_CHUNK_VALUES = 2**21  # values held at once by the resampling loops: 16 MB
_WINSOR = 4.0  # root mean squares
_BLOCK_VALUES = 2**17  # patterns x columns judged at once: they stay in the processor's cache
_SIGN_FLIP_STREAM, _BOOTSTRAP_STREAM = 1, 2


def is_constant(values: Floats) -> NDArray[np.bool_]:
    """Columns of `values` [documents, columns] that hold one value up to rounding: [columns]."""
    return np.ptp(values, axis=0) <= 1e-12 * np.abs(values).max(axis=0)


def _signs(documents: int, flips: int, seed: int) -> Iterator[Floats]:
    """Chunks [flips in chunk, documents] of +-1: all patterns but the identity if few, else random."""
    if 2**documents <= flips + 1:
        codes = np.arange(1, 2**documents)[:, None]
        yield 1.0 - 2.0 * ((codes >> np.arange(documents)) & 1)
        return
    rng = np.random.default_rng([seed, _SIGN_FLIP_STREAM])
    rows = max(1, _CHUNK_VALUES // documents)  # of the documents only: the stream must not depend on the columns
    for start in range(0, flips, rows):
        shape = (min(rows, flips - start), documents)
        yield 2.0 * rng.integers(0, 2, size=shape, dtype=np.int8) - 1.0


class _Powers(NamedTuple):
    """What a corrected mean is computed from; values scaled to at most 1, [documents, columns] or [columns].

    Attributes:
        values: x.
        cubes: x^3, where x is held within `_WINSOR` root mean squares.
        second: mean of x^2.
        inner: mean of x^2 over the values that are not held, those held counting as 0.
    """

    values: Floats
    cubes: Floats
    second: Floats
    inner: Floats

    @classmethod
    def of(cls, values: Floats) -> "_Powers":
        second = np.mean(values**2, axis=0)
        limit = _WINSOR * np.sqrt(second)
        held = np.clip(values, -limit, limit)
        return cls(values, held**3, second, np.mean(np.where(held == values, values, 0.0) ** 2, axis=0))

    def corrected_mean(self, first: Floats, third: Floats, of: slice) -> Floats:
        """The mean over its standard deviation, corrected for skewness by Hall's cubic.

        Args:
            first, third: [..., columns of the slice], sums of `values` and of `cubes` under some signs.
        """
        documents = len(self.values)
        second = np.where(self.second > 0, self.second, 1.0)[of]
        mean = first / documents
        # Where all values are within 1% of their mean, no decision hangs on their spread or skewness, and differences
        # of powers are rounding: spread is held at 1% and skewness taken as none.
        variance = second - mean * mean
        narrow = variance < 1e-4 * second
        scale = 1 / np.sqrt(np.where(narrow, 1e-4 * second, variance))
        student = mean * scale
        central = third / documents - mean * (3 * self.inner[of] - 2 * mean * mean)
        skewness = np.where(narrow, 0.0, central * scale**3)
        bend = skewness * student / 3
        return student * (1 + bend + bend * bend / 3) + skewness / (6 * documents)


def sign_flip_p(
    values: Floats, flips: int, seed: int, alternative: Literal["two-sided", "greater"] = "two-sided"
) -> Floats:
    """Sign-flip test of a zero mean, p = (1 + k) / (1 + B).

    The statistic is the mean over its standard deviation with its skewness taken out (Hall, J. R. Stat. Soc. B 54,
    1992, p. 221), computed anew under every flip; the skewness is that of values held within four root mean squares,
    because the plain estimate costs power where tails are heavy. Whatever the statistic, the test is exact where
    values are symmetric about zero. The bare mean would not do where they are skewed: its flips are symmetric, it is
    not, and far in the tail, where Holm reads it, it rejects too often (`docs/statistics.md` has the rates).

    Columns share the flips, and values are sorted first, so that p is a function of the values alone. With few
    documents (2^documents <= 1 + flips) all sign patterns are enumerated. `scipy.stats.permutation_test` gives the
    same p far more slowly, which matters to simulations.

    Args:
        flips: B, the number of random flips.
        alternative: "two-sided" tests for any mean but zero, "greater" for a mean above zero.

    Returns:
        p [columns]; 1 where all values are zero.
    """
    largest = np.abs(values).max(axis=0)
    # Scaled, so that powers neither under- nor overflow.
    powers = _Powers.of(np.sort(values / np.where(largest > 0, largest, 1.0), axis=0))
    documents, columns = values.shape

    def statistic(first: Floats, third: Floats, of: slice) -> Floats:
        corrected = powers.corrected_mean(first, third, of)
        return np.abs(corrected) if alternative == "two-sided" else corrected

    # Patterns that tie in exact arithmetic must count as ties whatever their rounding.
    threshold = statistic(powers.values.sum(axis=0), powers.cubes.sum(axis=0), slice(None))
    threshold -= 1e-8 * (1 + np.abs(threshold))
    extreme = np.zeros(columns, dtype=np.int64)
    total = 0
    for signs in _signs(documents, flips, seed):
        total += len(signs)
        width = max(1, _BLOCK_VALUES // len(signs))
        for start in range(0, columns, width):
            of = slice(start, start + width)
            drawn = statistic(signs @ powers.values[:, of], signs @ powers.cubes[:, of], of)
            extreme[of] += (drawn >= threshold[of]).sum(axis=0)
    return np.where(largest > 0, (1.0 + extreme) / (1.0 + total), 1.0)


def bca_interval(values: Floats, resamples: int, level: float, seed: int) -> tuple[Floats, Floats]:
    """Bootstrap interval of the mean over documents (BCa, `scipy.stats.bootstrap`).

    A constant column gives [c, c]; where BCa is undefined (every resample on one side of the mean) the
    percentile interval of the same resamples is given, so the result is never NaN.

    Args:
        resamples: number of bootstrap resamples; columns share them.
        level: coverage, e.g. 0.95.

    Returns:
        Lower and upper limits, [columns] each.
    """
    low, high = values.mean(axis=0), values.mean(axis=0)
    varying = np.flatnonzero(~is_constant(values))
    if varying.size == 0:
        return low, high
    documents = len(values)
    rows = np.ascontiguousarray(np.sort(values[:, varying], axis=0).T)
    # Rounded to 2^-32 of the largest, values have exact sums: neither the order of additions nor the other columns can
    # turn a tie of resampled means into a difference.
    unit = np.exp2(np.frexp(np.abs(rows).max(axis=1, keepdims=True))[1] - 32.0)
    rows = np.round(rows / unit) * unit

    def means(drawn: NDArray[np.integer], axis: int = -1) -> Floats:
        """Means [columns, ...] of the documents that were drawn, [..., draws]."""
        flat = drawn.reshape(-1, drawn.shape[axis])
        places = flat + documents * np.arange(len(flat))[:, None]
        counts = np.bincount(places.ravel(), minlength=documents * len(flat)).reshape(len(flat), documents)
        drawn_means = counts.astype(np.float64) @ rows.T / flat.shape[1]
        return drawn_means.T.reshape(len(rows), *drawn.shape[:axis])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy warns where BCa is degenerate: handled below
        # Documents are drawn, not values: how often each was drawn serves all columns.
        result = stats.bootstrap(
            (np.arange(documents),),
            means,
            n_resamples=resamples,
            batch=max(1, _CHUNK_VALUES // documents),
            vectorized=True,
            confidence_level=level,
            method="BCa",
            rng=np.random.default_rng([seed, _BOOTSTRAP_STREAM]),
        )
    tail = (1 - level) / 2
    percentile = np.quantile(result.bootstrap_distribution, [tail, 1 - tail], axis=-1)
    interval = result.confidence_interval
    undefined = np.isnan(interval.low) | np.isnan(interval.high)
    low[varying] = np.where(undefined, percentile[0], interval.low)
    high[varying] = np.where(undefined, percentile[1], interval.high)
    return low, high


def interval(values: Floats, config: StatisticsConfig) -> tuple[Floats, Floats]:
    """`bca_interval` with the resamples, level and seed of a configuration."""
    return bca_interval(values, config.bootstrap, 1 - config.alpha, config.seed)


def one_sided_p(values: Floats, bound: float, alternative: Literal["less", "greater"]) -> Floats:
    """One-sided test of the mean against a bound: Student's t, corrected for skewness where that costs it
    level.

    KL by document is skewed to the right, where Student's t rejects "mean >= bound" too often (at level .05:
    .07-.08 with 128 documents of gamma-distributed KL). Hall's cubic transformation of t (J. R. Stat. Soc. B
    54, 1992, p. 221) removes that error to first order; taking the larger p keeps the usual test where
    skewness would only have made it easier to pass.

    Args:
        bound: in the unit of the values.
        alternative: "less" rejects "mean >= bound", "greater" rejects "mean <= bound".

    Returns:
        p [columns]; for a constant column 0 or 1, by the side of the bound on which it lies (1 on the bound).
    """
    beyond = values[0] < bound if alternative == "less" else values[0] > bound
    p = np.where(beyond, 0.0, 1.0)  # the answer for constant columns; the others are overwritten
    varying = np.flatnonzero(~is_constant(values))
    if varying.size:
        columns = values[:, varying]
        documents = len(columns)
        student = stats.ttest_1samp(columns, bound, axis=0, alternative=alternative)
        gamma = stats.skew(columns, axis=0)
        scaled = student.statistic / np.sqrt(documents)
        corrected = np.sqrt(documents) * (
            scaled + gamma * scaled**2 / 3 + gamma**2 * scaled**3 / 27 + gamma / (6 * documents)
        )
        tail = stats.t.cdf if alternative == "less" else stats.t.sf
        p[varying] = np.maximum(student.pvalue, tail(corrected, documents - 1))
    return p


def equivalence_p(values: Floats, margin: float) -> Floats:
    """TOST: p [columns] of the claim that the mean lies within +-margin, the larger of two `one_sided_p`."""
    return np.maximum(one_sided_p(values, -margin, "greater"), one_sided_p(values, margin, "less"))


class MarginTests(NamedTuple):
    """p [columns] of the three tests of a cell against the margin, unadjusted.

    Attributes:
        tost_p: mean dNLL lies beyond the margin, on either side.
        kl_upper_p: mean KL is at least the margin.
        kl_lower_p: mean KL is at most the margin.
    """

    tost_p: Floats
    kl_upper_p: Floats
    kl_lower_p: Floats


def margin_tests(dnll: Floats, kl: Floats, margin: float) -> MarginTests:
    """The tests of each cell against the margin; dnll and kl [documents, columns], all in nats/token."""
    return MarginTests(equivalence_p(dnll, margin), one_sided_p(kl, margin, "less"), one_sided_p(kl, margin, "greater"))


def adjust_p(p: ArrayLike, family_size: int, method: Literal["holm", "fdr_bh"] = "holm") -> Floats:
    """Adjusted p of the tests at hand within a family of which some tests may be missing.

    The missing tests enter with p = 1. That is the worst they can be: an adjusted p, of Holm and of
    Benjamini-Hochberg alike, never falls when another p of the family rises, so what is returned bounds from
    above what the whole family would give, whatever the missing tests turn out to be. For Holm: the k-th
    smallest p at hand is multiplied by `family_size - k + 1`; a missing test that is smaller would only lower
    that factor, and its own product, which Holm carries upward, is at most the one used here.

    Args:
        p: [tests at hand].
        family_size: tests in the whole family.
        method: "holm", or "fdr_bh" (Benjamini-Hochberg, for maps).

    Returns:
        Adjusted p [tests at hand].

    Raises:
        ValueError: the family is smaller than the tests at hand.
    """
    p = np.asarray(p, dtype=np.float64)
    if family_size < len(p):
        raise ValueError(f"family_size={family_size} but {len(p)} tests were given: pass the size of the whole family")
    if len(p) == 0:
        return p
    if method == "fdr_bh":
        padded = np.concatenate([p, np.ones(family_size - len(p))])
        return np.asarray(multipletests(padded, method=method)[1][: len(p)])
    # Not statsmodels' Holm, which runs the garbage collector at each call: 0.1 s where a model is in memory.
    order = np.argsort(p)
    adjusted = np.empty_like(p)
    steps = np.maximum.accumulate(p[order] * (family_size - np.arange(len(p))))
    adjusted[order] = np.minimum(steps, 1.0)
    return adjusted

"""Tests by document against scipy, statsmodels and closed forms, and their error rates under simulation."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import DescrStatsW

from attnres.errors import ConfigError
from attnres.statistics import inference
from attnres.statistics.config import StatisticsConfig
from attnres.statistics.inference import adjust_p, bca_interval, equivalence_p, one_sided_p, sign_flip_p
from attnres.statistics.sample_size import documents_needed


def values(documents: int, columns: int, mean: float = 0.0, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, 1.0, size=(documents, columns))


probabilities = st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=12)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("margin", 0.0),
        ("margin", float("nan")),
        ("alpha", 0.5),
        ("sign_flips", 998),
        ("bootstrap", 10),
        ("seed", -1),
        ("grid_cells", 0),
        ("power", 0.01),
    ],
)
def test_statistics_config_refuses_what_is_out_of_range(name, value):
    with pytest.raises(ConfigError, match=f"statistics.{name}="):
        StatisticsConfig(**{name: value})


def test_statistics_config_refuses_a_grid_that_its_flips_cannot_resolve():
    StatisticsConfig(sign_flips=999, grid_cells=50)
    with pytest.raises(ConfigError, match="at least 1020"):
        StatisticsConfig(sign_flips=999, grid_cells=51)


def corrected_mean(x, axis):
    """Hall's cubic of t / sqrt(n) in its closed form, a cube, with the skewness of values held within 4 rms."""
    n, mean = x.shape[axis], x.mean(axis)
    rms = np.sqrt((x**2).mean(axis))
    held = np.clip(x, -4 * np.expand_dims(rms, axis), 4 * np.expand_dims(rms, axis))
    inner = np.where(held == x, x**2, 0.0).mean(axis)
    deviation = x.std(axis)
    gamma = ((held**3).mean(axis) - 3 * mean * inner + 2 * mean**3) / deviation**3
    return ((1 + gamma * mean / deviation / 3) ** 3 - 1) / gamma + gamma / (6 * n)


@pytest.mark.parametrize("documents", [3, 5, 9])
@pytest.mark.parametrize("alternative", ["two-sided", "greater"])
def test_sign_flip_is_exact_with_few_documents(documents, alternative):
    data = values(documents, 6, mean=0.4)

    def statistic(x, axis):
        # scipy doubles the smaller tail for "two-sided"; the test of |statistic| is its "greater" on that. A pattern
        # and its mirror image have one |statistic| up to rounding, which differs between processors: rounded, they tie.
        found = np.round(corrected_mean(x, axis), 9)
        return np.abs(found) if alternative == "two-sided" else found

    expected = stats.permutation_test(
        (data,), statistic, permutation_type="samples", alternative="greater", n_resamples=np.inf, axis=0
    ).pvalue
    np.testing.assert_allclose(sign_flip_p(data, 999, 0, alternative), expected, rtol=1e-12)


def test_sign_flip_agrees_with_scipy_to_monte_carlo_error():
    data = np.random.default_rng(0).gamma(0.3, size=(40, 5)) - np.array([0.02, 0.1, 0.2, 0.3, 0.4])
    expected = stats.permutation_test(
        (data,),
        lambda x, axis: np.abs(corrected_mean(x, axis)),
        permutation_type="samples",
        alternative="greater",
        n_resamples=4999,
        axis=0,
        batch=500,
        rng=np.random.default_rng(3),
    ).pvalue
    error = np.sqrt(expected * (1 - expected) * (1 / 4999 + 1 / 9999))
    assert expected.min() < 0.1 < 0.4 < expected.max()
    assert np.all(np.abs(sign_flip_p(data, 9999, 0) - expected) < 4 * error + 2e-4)


def test_sign_flip_holds_level_far_in_the_tail_of_skewed_values_where_the_bare_mean_does_not():
    data = np.random.default_rng(3).exponential(size=(96, 6000)) - 1
    student = stats.ttest_1samp(data, 0.0).pvalue
    rejected = (sign_flip_p(data[:, student <= 0.02], 1999, 0) <= 0.05 / 24).sum()
    assert rejected <= stats.binom.ppf(0.999, 6000, 0.05 / 24) < (student <= 0.05 / 24).sum()


def test_sign_flip_does_not_depend_on_the_unit_nor_on_the_sign():
    data = np.random.default_rng(4).gamma(0.5, size=(30, 4)) - 0.3
    p = sign_flip_p(data, 999, 0)
    np.testing.assert_array_equal(sign_flip_p(1e-160 * data, 999, 0), p)
    np.testing.assert_array_equal(sign_flip_p(1e120 * data, 999, 0), p)
    few = sign_flip_p(data[:8], 999, 0)
    np.testing.assert_array_equal(sign_flip_p(-data[:8], 999, 0), few)


def test_sign_flip_smallest_p_counts_the_observed_pattern():
    data = np.full((30, 1), 0.1) + values(30, 1) * 1e-3
    assert sign_flip_p(data, 999, 0) == pytest.approx(1 / 1000)
    assert sign_flip_p(data[:4], 999, 0) == pytest.approx(2 / 16)  # all plus and all minus


def test_sign_flip_of_zeros_is_one():
    assert sign_flip_p(np.zeros((50, 2)), 999, 0).tolist() == [1.0, 1.0]
    assert sign_flip_p(np.zeros((5, 1)), 999, 0, "greater").tolist() == [1.0]


def test_sign_flip_is_the_same_in_small_chunks(monkeypatch):
    data = values(30, 7, mean=0.2)
    whole = sign_flip_p(data, 999, 0)
    monkeypatch.setattr(inference, "_CHUNK_VALUES", 30 * 128)  # even chunks leave the stream of flips as it is
    np.testing.assert_array_equal(sign_flip_p(data, 999, 0), whole)


def test_sign_flip_depends_on_the_seed_only_by_monte_carlo_error():
    data = values(40, 1, mean=0.3)
    p = np.array([sign_flip_p(data, 1999, seed)[0] for seed in range(8)])
    assert len(set(p)) > 1
    assert np.ptp(p) < 10 * np.sqrt(p.mean() / 1999)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 40), st.integers(1, 5))
def test_inference_ignores_document_order_and_other_columns(seed, documents, columns):
    rng = np.random.default_rng(seed)
    data = rng.normal(size=(documents, columns)).round(1)
    order, column = rng.permutation(documents), rng.integers(columns)
    alone = data[order][:, [column]]
    assert sign_flip_p(alone, 999, 7)[0] == sign_flip_p(data, 999, 7)[column]
    for mine, all_columns in zip(bca_interval(alone, 200, 0.95, 7), bca_interval(data, 200, 0.95, 7), strict=True):
        assert mine[0] == pytest.approx(all_columns[column], rel=1e-12, abs=1e-15)


def test_sign_flip_by_document_holds_level_where_windows_would_not():
    """Correlated windows: level by document at most 0.05 up to binomial error, far above it by window."""
    documents, windows, replicates = 60, 8, 2000
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(documents, 1, replicates))
    by_window = shared + rng.normal(size=(documents, windows, replicates))
    level = np.mean(sign_flip_p(by_window.mean(axis=1), 999, 0) <= 0.05)
    naive = np.mean(sign_flip_p(by_window.reshape(-1, replicates), 999, 0) <= 0.05)
    assert stats.binom.ppf(0.001, replicates, 0.05) <= level * replicates <= stats.binom.ppf(0.999, replicates, 0.05)
    assert naive > 0.2


def test_bca_equals_scipy_column_by_column():
    data = np.random.default_rng(1).gamma(1.0, size=(50, 4))
    low, high = bca_interval(data, 500, 0.9, 11)
    for column in range(4):
        expected = stats.bootstrap(
            (np.sort(data[:, column]),),
            np.mean,
            n_resamples=500,
            confidence_level=0.9,
            method="BCa",
            rng=np.random.default_rng([11, 2]),
        ).confidence_interval
        assert (low[column], high[column]) == pytest.approx((expected.low, expected.high), rel=1e-8)


def test_bca_covers_the_mean_of_skewed_values():
    data = np.random.default_rng(2).gamma(1.0, size=(100, 400))
    low, high = bca_interval(data, 400, 0.95, 0)
    assert 0.90 <= np.mean((low <= 1.0) & (high >= 1.0)) <= 0.98


def test_bca_of_degenerate_columns_is_never_nan():
    one_odd = np.zeros(40)
    one_odd[3] = 1.0
    data = np.stack([np.zeros(40), np.full(40, -0.3), one_odd, 1e-300 * np.arange(40)], axis=1)
    low, high = bca_interval(data, 200, 0.95, 0)
    assert (low[0], high[0]) == (0.0, 0.0)
    assert (low[1], high[1]) == pytest.approx((-0.3, -0.3))
    assert np.isfinite([low, high]).all()
    assert low[2] <= one_odd.mean() <= high[2]
    two = bca_interval(np.array([[0.0], [1.0]]), 200, 0.95, 0)
    assert np.isfinite(two).all()


def symmetric(documents: int, mean: float) -> np.ndarray:
    half = np.random.default_rng(4).normal(size=(documents // 2, 3))
    return np.concatenate([half, -half]) + mean


@pytest.mark.parametrize("mean", [0.0, 0.2, -0.35])
def test_tost_equals_statsmodels_without_skewness(mean):
    data = symmetric(60, mean)
    expected = DescrStatsW(data).ttost_mean(-0.4, 0.4)[0]
    # Only the skewness term could differ, and it is zero here.
    np.testing.assert_allclose(equivalence_p(data, 0.4), expected, rtol=1e-9)


def test_one_sided_p_corrects_student_by_hall_for_skewness():
    data = np.random.default_rng(5).gamma(0.5, size=(30, 1))
    student = stats.ttest_1samp(data[:, 0], 1.0, alternative="less").pvalue
    scaled = (data.mean() - 1.0) / data.std(ddof=1)
    gamma = stats.skew(data[:, 0])
    # Hall's cubic in its closed form, a cube, and not in the expanded one of the code.
    cubic = ((1 + gamma * scaled / 3) ** 3 - 1) / gamma + gamma / (6 * 30)
    corrected = stats.t.cdf(np.sqrt(30) * cubic, 29)
    assert corrected > student
    assert one_sided_p(data, 1.0, "less")[0] == pytest.approx(corrected, rel=1e-9)
    upper = stats.ttest_1samp(data[:, 0], 0.2, alternative="greater").pvalue
    assert one_sided_p(data, 0.2, "greater")[0] == pytest.approx(upper, rel=1e-9)


def test_one_sided_p_of_constant_columns_is_the_side_of_the_bound():
    data = np.tile([0.0, 0.005, 0.01], (20, 1))
    assert one_sided_p(data, 0.005, "less").tolist() == [0.0, 1.0, 1.0]
    assert one_sided_p(data, 0.005, "greater").tolist() == [1.0, 1.0, 0.0]
    assert equivalence_p(data, 0.005).tolist() == [0.0, 1.0, 1.0]


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_tost_holds_level_at_the_margin(sign):
    replicates = 4000
    data = values(128, replicates, mean=sign * 0.5, seed=6)
    passed = int((equivalence_p(data, 0.5) <= 0.05).sum())
    low, high = stats.binom.ppf([0.001, 0.999], replicates, 0.05)
    assert low <= passed <= high


def test_one_sided_p_holds_level_for_skewed_values_where_student_does_not():
    data = np.random.default_rng(7).gamma(1.0, size=(128, 6000))
    level = np.mean(one_sided_p(data, 1.0, "less") <= 0.05)
    student = np.mean(stats.ttest_1samp(data, 1.0, axis=0, alternative="less").pvalue <= 0.05)
    assert level < 0.06 < 0.065 < student


@pytest.mark.parametrize("method", ["holm", "fdr_bh"])
@pytest.mark.parametrize("p", [[0.5], [0.03, 0.001, 0.2, 0.001, 1.0], [0.9, 0.8, 0.7], [1e-4, 0.04, 0.02, 0.011]])
def test_adjust_p_of_a_whole_family_equals_statsmodels(method, p):
    np.testing.assert_allclose(adjust_p(p, len(p), method), multipletests(p, method=method)[1], rtol=1e-14)


def test_adjust_p_holm_by_hand():
    assert adjust_p([0.01, 0.04, 0.03], 4) == pytest.approx([0.04, 0.09, 0.09])


@pytest.mark.parametrize("method", ["holm", "fdr_bh"])
@given(p=probabilities, missing=probabilities)
def test_adjust_p_of_part_of_a_family_bounds_the_whole(method, p, missing):
    """Whatever the missing tests turn out to be."""
    whole = adjust_p([*p, *missing], len(p) + len(missing), method)[: len(p)]
    assert np.all(adjust_p(p, len(p) + len(missing), method) >= whole - 1e-12)


def test_adjust_p_of_nothing_and_of_too_much():
    assert adjust_p([], 24).size == 0
    with pytest.raises(ValueError, match="family_size=1"):
        adjust_p([0.1, 0.2], 1)


def scaled(documents: int, mean: float, deviation: float) -> np.ndarray:
    """[documents, 1] with exactly this mean and standard deviation."""
    column = values(documents, 1, seed=8)
    return mean + deviation * (column - column.mean()) / column.std(ddof=1)


def test_documents_needed_to_detect_in_closed_form():
    config = StatisticsConfig()
    needed = documents_needed(scaled(50, 0.02, 0.1), scaled(50, 0.004, 0.001), 24, config)
    z = stats.norm.isf(0.025 / 24) + stats.norm.isf(0.1)
    assert needed[0] == np.ceil((z * 0.1 / 0.02) ** 2)


def test_documents_needed_to_detect_a_kl_above_the_margin():
    needed = documents_needed(np.zeros((50, 1)), scaled(50, 0.006, 0.01), 24, StatisticsConfig())
    z = stats.norm.isf(0.05 / 24) + stats.norm.isf(0.1)
    assert needed[0] == np.ceil((z * 0.01 / 0.001) ** 2)


@pytest.mark.parametrize(("kl", "slower"), [(0.001, "dnll"), (0.00495, "kl")])
def test_documents_needed_for_equivalence_waits_for_the_slower_test(kl, slower):
    needed = documents_needed(scaled(50, 1e-4, 0.05), scaled(50, kl, 0.002), 24, StatisticsConfig())
    alpha, beta = stats.norm.isf(0.05), stats.norm.isf(0.1)
    expected = {
        "dnll": ((alpha + stats.norm.isf(0.05)) * 0.05 / 0.0049) ** 2,
        "kl": ((alpha + beta) * 0.002 / (0.005 - kl)) ** 2,
    }
    assert expected[slower] == max(expected.values())
    assert needed[0] == np.ceil(expected[slower])


def test_documents_needed_is_more_than_there_are_and_enough_for_the_flips():
    sure = scaled(8, 0.5, 1e-3), scaled(8, 0.5, 1e-3)
    assert documents_needed(*sure, 24, StatisticsConfig())[0] == 10  # 2^(1-10) <= 0.05 / 24 < 2^(1-9)
    assert documents_needed(*sure, 1, StatisticsConfig())[0] == 9


def test_documents_needed_is_infinite_where_nothing_can_decide():
    at_margin = np.full((20, 1), 0.005)
    assert np.isinf(documents_needed(np.zeros((20, 1)), at_margin, 24, StatisticsConfig()))


def test_documents_needed_decide_with_the_stated_power():
    config = StatisticsConfig()
    needed = int(documents_needed(scaled(100, 0.3, 1.0), scaled(100, 0.004, 1e-4), 24, config)[0])
    detected = np.mean(sign_flip_p(values(needed, 1000, mean=0.3, seed=9), 9999, 0) <= 0.05 / 24)
    assert 0.87 <= detected <= 0.93

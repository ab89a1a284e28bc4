from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ballast_bench.stats import Comparison, bootstrap_interval, compare_paired, holm, summarise

FINITE = st.floats(-10, 10, allow_nan=False)


def test_summary_is_mean_and_sample_deviation():
    summary = summarise([1.0, 2.0, 4.0])
    assert (summary.n, summary.mean) == (3, pytest.approx(7 / 3))
    assert summary.std == pytest.approx(np.std([1, 2, 4], ddof=1))


def test_one_value_has_no_deviation():
    assert summarise([3.0]).std is None


def test_nothing_to_summarise_is_an_error():
    with pytest.raises(ValueError, match="values is empty"):
        summarise([])


@pytest.mark.parametrize("n", [3, 5, 8, 20])
def test_tests_agree_with_scipy(n):
    rng = np.random.default_rng(n)
    ours, base = rng.normal(0.3, 1, n), rng.normal(0, 1, n)
    comparison = compare_paired(dict(enumerate(ours)), dict(enumerate(base)))
    assert comparison.p_t == pytest.approx(stats.ttest_rel(ours, base).pvalue, rel=1e-9)
    assert comparison.p_wilcoxon == pytest.approx(stats.wilcoxon(ours - base, method="exact").pvalue)
    assert comparison.difference == pytest.approx((ours - base).mean())


def test_wilcoxon_cannot_fall_below_two_to_the_one_minus_n():
    comparison = compare_paired({s: 5.0 + s for s in range(3)}, {s: 0.1 * s * s for s in range(3)})
    assert comparison.p_wilcoxon == 0.25


def test_only_common_seeds_are_paired():
    comparison = compare_paired({0: 1.0, 1: 2.0, 7: 100.0}, {1: 1.5, 0: 0.0, 9: -5.0})
    assert comparison.n == 2
    assert comparison.difference == pytest.approx(0.75)


def test_no_common_seed_means_no_comparison():
    assert compare_paired({0: 1.0}, {1: 1.0}) is None


def test_equal_differences_have_no_p_value():
    comparison = compare_paired({0: 1.1, 1: 2.1, 2: 3.1}, {0: 1.0, 1: 2.0, 2: 3.0})
    assert comparison.p_t is None
    assert comparison.verdict(1) == "untested"


def test_bootstrap_enumerates_all_resamples_of_two():
    # means 0, 1/2, 1/2, 1 with equal weight; numpy's linear quantiles of these four
    low, high = bootstrap_interval([0.0, 1.0])
    assert (low, high) == (pytest.approx(np.quantile([0, 0.5, 0.5, 1], 0.025)), pytest.approx(0.9625))


def test_bootstrap_of_many_agrees_with_scipy():
    differences = np.random.default_rng(0).normal(0.5, 1, 40)
    low, high = bootstrap_interval(differences.tolist())
    reference = stats.bootstrap((differences,), np.mean, method="percentile", rng=np.random.default_rng(1))
    assert low == pytest.approx(reference.confidence_interval.low, abs=0.02)
    assert high == pytest.approx(reference.confidence_interval.high, abs=0.02)


def test_bootstrap_needs_two_values_and_a_level():
    assert bootstrap_interval([1.0]) is None
    with pytest.raises(ValueError, match="level must be in"):
        bootstrap_interval([1.0, 2.0], level=float("nan"))


def test_holm_known_numbers():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_holm_leaves_out_missing_values():
    assert holm([0.01, None, 0.02]) == [pytest.approx(0.02), None, pytest.approx(0.02)]


@settings(derandomize=True, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_only_raises_and_keeps_the_order(p_values):
    adjusted = holm(p_values)
    assert all(p <= q <= 1 for p, q in zip(p_values, adjusted, strict=True))
    order = np.argsort(p_values, kind="stable")
    assert all(np.diff(np.array(adjusted)[order]) >= 0)


@settings(derandomize=True, deadline=None, max_examples=50)
@given(st.lists(FINITE, min_size=2, max_size=5), FINITE)
def test_interval_lies_within_the_differences_and_moves_with_them(differences, shift):
    low, high = bootstrap_interval(differences)
    assert min(differences) - 1e-9 <= low <= high <= max(differences) + 1e-9
    moved = bootstrap_interval([value + shift for value in differences])
    assert moved == (pytest.approx(low + shift, abs=1e-9), pytest.approx(high + shift, abs=1e-9))


@pytest.mark.parametrize(
    ("n", "difference", "p", "sign", "verdict"),
    [
        (5, 0.1, 0.01, 1, "better"),
        (5, 0.1, 0.01, -1, "worse"),
        (5, -0.1, 0.01, 1, "worse"),
        (5, 0.1, 0.2, 1, "unclear"),
        (2, 0.1, 0.01, 1, "untested"),
    ],
)
def test_verdict(n, difference, p, sign, verdict):
    assert Comparison(n, difference, 0.0, 0.0, 0.001, 0.25, p).verdict(sign) == verdict

"""Paired differences and Holm's correction, against scipy's own tests and a worked example."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from eval.significance import holm, paired_difference


@pytest.mark.parametrize("seeds", [2, 3, 10])
def test_the_interval_and_p_are_those_of_the_paired_t_test(seeds: int) -> None:
    rng = np.random.default_rng(seeds)
    first, second = rng.normal(70, 2, seeds), rng.normal(69, 2, seeds)
    expected = stats.ttest_rel(first, second)
    found = paired_difference(first.tolist(), second.tolist())
    assert found.p == pytest.approx(expected.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval(0.95)))


@pytest.mark.parametrize(("seeds", "comparisons"), [(3, 1), (3, 5), (10, 1), (10, 5)])
def test_the_detectable_difference_is_found_in_four_of_five_repetitions(seeds: int, comparisons: int) -> None:
    """By simulation at a spread that is known; Bonferroni's level is that of Holm's strictest step."""
    rng = np.random.default_rng(0)
    sample = rng.normal(0, 1.5, (200_000, seeds))
    unit = np.array([1.0, -1.0] * seeds)[:seeds]
    found = paired_difference(unit.tolist(), np.zeros(seeds).tolist(), comparisons)
    detectable = found.detectable / np.std(unit, ddof=1) * 1.5
    p = stats.ttest_1samp(sample + detectable, 0, axis=1).pvalue
    assert np.mean(p < 0.05 / comparisons) == pytest.approx(0.8, abs=0.01)


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # worked by hand
    assert holm([0.6, 0.7]) == [1.0, 1.0] and holm([]) == []


def test_too_few_seeds_are_refused() -> None:
    with pytest.raises(ValueError, match="at least two"):
        paired_difference([1.0], [2.0])


@pytest.mark.parametrize("gain", [0.0, 0.2])
def test_differences_without_spread_say_nothing(gain: float) -> None:
    first = [70.1, 68.3, 71.7]
    found = paired_difference([score + gain for score in first], first)
    assert (found.p, found.detectable) == (1.0, np.inf) and found.mean == pytest.approx(gain)

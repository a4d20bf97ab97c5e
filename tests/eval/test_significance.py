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


def test_the_detectable_difference_is_found_in_four_of_five_repetitions() -> None:
    """By simulation at a known spread; with the true spread in place of the observed one the power is close to 0.8."""
    rng = np.random.default_rng(0)
    spread, seeds = 1.5, 10
    detectable = spread / np.sqrt(seeds) * (stats.t.ppf(0.975, seeds - 1) + stats.t.ppf(0.8, seeds - 1))
    sample = rng.normal(0, spread, (20000, seeds))
    found = [paired_difference(row, np.zeros(seeds)).detectable for row in sample[:2000]]
    assert np.mean(found) == pytest.approx(detectable, rel=0.05)
    p = stats.ttest_1samp(sample + detectable, 0, axis=1).pvalue
    assert np.mean(p < 0.05) == pytest.approx(0.8, abs=0.03)


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # worked by hand
    assert holm([0.6, 0.7]) == [1.0, 1.0] and holm([]) == []


def test_too_few_seeds_are_refused() -> None:
    with pytest.raises(ValueError, match="at least two"):
        paired_difference([1.0], [2.0])
    assert paired_difference([1.0, 2.0], [1.0, 2.0]).p == 1.0

"""Is a difference between two methods more than seeds would give? Paired over seeds, corrected for many comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class PairedDifference:
    """The difference of two methods that were run with the same seeds, in the unit of their scores.

    Attributes:
        mean: mean difference, first minus second.
        low, high: its 95 % confidence interval (Student's t over the seeds).
        p: two-sided p-value of the paired t-test.
        detectable: the smallest true difference that so many seeds find in four of five repetitions (power 0.8 at level
            0.05), at the spread that was observed.
        seeds: number of pairs.
    """

    mean: float
    low: float
    high: float
    p: float
    detectable: float
    seeds: int


def paired_difference(first: Sequence[float], second: Sequence[float]) -> PairedDifference:
    """Compare two methods seed by seed.

    Raises:
        ValueError: if the two are not of equal length, or have fewer than two seeds.
    """
    if len(first) != len(second) or len(first) < 2:
        raise ValueError(f"expected the same seeds for both, at least two; received {len(first)} and {len(second)}")
    difference = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    freedom = len(difference) - 1
    mean, error = float(difference.mean()), float(difference.std(ddof=1) / np.sqrt(len(difference)))
    margin = error * float(stats.t.ppf(0.975, freedom))
    detectable = error * float(stats.t.ppf(0.975, freedom) + stats.t.ppf(0.8, freedom))
    p = float(2 * stats.t.sf(abs(mean) / error, freedom)) if error > 0 else float(mean == 0)
    return PairedDifference(mean, mean - margin, mean + margin, p, detectable, len(difference))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: the p-values that each of several comparisons has when all are looked at.

    Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6, 1979.
    """
    order = np.argsort(p_values, kind="stable")
    adjusted, running = [0.0] * len(order), 0.0
    for step, index in enumerate(order):
        running = max(running, min(1.0, (len(order) - step) * p_values[index]))
        adjusted[index] = running
    return adjusted

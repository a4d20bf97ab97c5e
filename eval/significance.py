"""Is a difference between two methods more than seeds would give? Paired over seeds, corrected for many comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats
from scipy.optimize import brentq


@dataclass(frozen=True)
class PairedDifference:
    """The difference of two methods that were run with the same seeds, in the unit of their scores.

    Attributes:
        mean: mean difference, first minus second.
        low, high: its 95 % confidence interval (Student's t over the seeds).
        p: two-sided p-value of the paired t-test.
        detectable: the smallest true difference that so many seeds find in four of five repetitions, at the spread that
            was observed: power 0.8 at the level that the strictest step of Holm's correction asks for, 0.05 divided by
            the number of comparisons. Infinite where the seeds show no spread.
        seeds: number of pairs.
    """

    mean: float
    low: float
    high: float
    p: float
    detectable: float
    seeds: int


def paired_difference(first: Sequence[float], second: Sequence[float], comparisons: int = 1) -> PairedDifference:
    """Compare two methods seed by seed.

    Differences that are all the same, but for rounding, say nothing about chance: p is 1 then.

    Args:
        first, second: scores, one a seed, in the same order.
        comparisons: how many of them are corrected together; `detectable` depends on it.

    Raises:
        ValueError: if the two are not of equal length, or have fewer than two seeds.
    """
    if len(first) != len(second) or len(first) < 2:
        raise ValueError(f"expected the same seeds for both, at least two; received {len(first)} and {len(second)}")
    difference = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    seeds, mean, spread = len(difference), float(difference.mean()), float(difference.std(ddof=1))
    if spread <= 1e-9 * max(np.abs(first).max(), np.abs(second).max()):
        return PairedDifference(mean, mean, mean, 1.0, np.inf, seeds)
    error = spread / np.sqrt(seeds)
    margin = error * float(stats.t.ppf(0.975, seeds - 1))
    p = float(2 * stats.t.sf(abs(mean) / error, seeds - 1))
    return PairedDifference(mean, mean - margin, mean + margin, p, error * _detectable(seeds, comparisons), seeds)


def _detectable(seeds: int, comparisons: int, level: float = 0.05, power: float = 0.8) -> float:
    """The true difference, in standard errors, that a two-sided paired t-test finds with the given power."""
    freedom = seeds - 1
    threshold = stats.t.ppf(1 - level / (2 * comparisons), freedom)
    return float(brentq(lambda true: stats.nct.sf(threshold, freedom, true) - power, 0.0, 20 * threshold))


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

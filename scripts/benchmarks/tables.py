"""Tables of a benchmark's page."""

from __future__ import annotations

from benchmarks.measure import median_interval


def markdown(heads: list[str], lines: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [heads, ["---"] * len(heads), *lines])


def time_ratio(ratios: list[float]) -> str:
    """The median of paired ratios and its 95 % interval."""
    if not ratios:
        return "-"
    median, low, high = median_interval(ratios)
    return f"x {median:.3f} ({low:.3f} to {high:.3f})"


def verdict(ratios: list[float], target: float) -> str:
    """Whether the median lies at or below the target: decided when its whole interval lies on one side."""
    _, low, high = median_interval(ratios)
    return "yes" if high <= target else "no" if low > target else "not decided"

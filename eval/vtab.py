"""Accuracies of VTAB-1K's data sets -> the averages that its tables print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def vtab_averages(accuracies: Mapping[str, float], groups: Mapping[str, Sequence[str]]) -> dict[str, float | None]:
    """Mean of each group, mean of the groups ("average") and mean of all data sets ("all").

    The paper's Table 2 prints the latter two as "Average" and "All Set Average". A mean is None while a data set of it
    is missing: a mean over fewer would look like one over all.

    Args:
        accuracies: data set -> percent.
        groups: group -> its data sets.

    Raises:
        ValueError: for a data set that is in no group.
    """
    members = [name for names in groups.values() for name in names]
    if unknown := accuracies.keys() - set(members):
        raise ValueError(f"{min(unknown)} is in none of the groups {', '.join(groups)}")
    means = {group: _mean([accuracies.get(name) for name in names]) for group, names in groups.items()}
    return means | {"average": _mean(list(means.values())), "all": _mean([accuracies.get(name) for name in members])}


def _mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there and len(there) == len(values) else None

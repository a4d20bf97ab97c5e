"""Redundancy matrices -> one number a layer, and the layer to draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from regularizers.diagnostics import mean_off_diagonal

Matrices = Mapping[str, Sequence[Sequence[float]]]


@dataclass(frozen=True)
class LayerRedundancy:
    """Mean off-diagonal redundancy of one layer, in 0..1, before and after regularization."""

    layer: str
    before: float
    after: float


def layer_redundancies(before: Matrices, after: Matrices) -> list[LayerRedundancy]:
    """One entry a layer, in the order of the file.

    Raises:
        ValueError: if the two do not cover the same layers, or there are none.
    """
    if not before or set(before) != set(after):
        raise ValueError(
            f"redundancy.json: expected the same layers before and after, at least one; received {len(before)} before, "
            f"{len(after)} after, {len(set(before) & set(after))} in common"
        )
    return [LayerRedundancy(name, mean_off_diagonal(before[name]), mean_off_diagonal(after[name])) for name in before]


def common_prefix(names: Sequence[str]) -> str:
    """The leading components that all dotted names share, with the last dot: "layer." of "layer.0.q", "layer.1.q"."""
    shared = []
    for components in zip(*(name.split(".")[:-1] for name in names), strict=False):
        if len(set(components)) > 1:
            break
        shared.append(components[0] + ".")
    return "".join(shared)

"""Subspaces of each layer -> the numbers that say how redundant they are, as a table."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from regularizers import Subspaces, dead_components, effective_rank, redundancy
from regularizers.diagnostics import mean_off_diagonal


@dataclass(frozen=True, kw_only=True)
class LayerDiagnosis:
    """How redundant the subspaces of one layer are.

    Attributes:
        layer: its name.
        redundancy: mean of the entries of `regularizers.redundancy` off the diagonal, in 0..1; None at rank 1, where
            there is no pair.
        effective_rank: between 1 and rank; 0 for an update that is zero.
        dead: components that add next to nothing.
        rank: number of subspaces.
    """

    layer: str
    redundancy: float | None
    effective_rank: float
    dead: int
    rank: int


def diagnose(subspaces: Mapping[str, Subspaces]) -> list[LayerDiagnosis]:
    """One entry a layer, in the given order."""
    return [
        LayerDiagnosis(
            layer=name,
            redundancy=mean_off_diagonal(redundancy(pair)) if len(pair.basis) > 1 else None,
            effective_rank=effective_rank(pair),
            dead=dead_components(pair),
            rank=len(pair.basis),
        )
        for name, pair in subspaces.items()
    ]


def render_diagnosis(layers: Sequence[LayerDiagnosis]) -> str:
    """A table for the terminal, one line a layer and a last one with the means."""
    pairs = [layer.redundancy for layer in layers if layer.redundancy is not None]
    rows = [(x.layer, x.redundancy, f"{x.effective_rank:.2f}", f"{x.dead:.0f}", f"{x.rank:.0f}") for x in layers]
    means = [f"{np.mean([getattr(x, key) for x in layers]):.2f}" for key in ("effective_rank", "dead", "rank")]
    rows.append(("mean", float(np.mean(pairs)) if pairs else None, means[0], means[1], means[2]))
    width = max(len(row[0]) for row in rows)
    lines = [f"{'layer':{width}}  redundancy  effective rank   dead   rank"]
    for name, mean, effective, dead, rank in rows:
        value = "-" if mean is None else f"{mean:.3f}"
        lines.append(f"{name:{width}}  {value:>10}  {effective:>14}  {dead:>5}  {rank:>5}")
    return "\n".join(lines)


def csv_of(diagnoses: Sequence[tuple[str, str, Sequence[LayerDiagnosis]]]) -> str:
    """(source, on what, its layers) each -> CSV, one line a layer, unrounded; redundancy is empty at rank 1."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["source", "on", "layer", "redundancy", "effective_rank", "dead", "rank"])
    for source, on, layers in diagnoses:
        for x in layers:
            writer.writerow([source, on, x.layer, x.redundancy, x.effective_rank, x.dead, x.rank])
    return text.getvalue()

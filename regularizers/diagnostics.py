"""How redundant a trained adapter is: the heat map of the paper's Figure 1a, and its one-number summary."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from regularizers.linear import cosines
from regularizers.subspaces import Subspaces


@torch.no_grad()
def redundancy(subspaces: Subspaces) -> Tensor:
    """The redundancy of each two subspaces, |cos(s_i, s_j)| over the samples: (r, r) in [0, 1], 1 on the diagonal.

    It is the square root of the term that Eq. 7 sums. A subspace that is zero on every sample has zero redundancy,
    also with itself.
    """
    return cosines(subspaces.activations).abs().clamp(max=1.0)


def mean_redundancy(subspaces: Mapping[str, Subspaces]) -> float:
    """The mean of the off-diagonal entries of `redundancy`, averaged over the layers; in [0, 1].

    Raises:
        ValueError: if there is no layer, or a layer has one subspace only (no pair).
    """
    if not subspaces:
        raise ValueError("no subspaces: run the model inside `with capture(model) as subspaces:` first")
    means = []
    for name, layer in subspaces.items():
        heat = redundancy(layer)
        pairs = heat[~torch.eye(len(heat), dtype=torch.bool, device=heat.device)]
        if not len(pairs):
            raise ValueError(f"{name} has rank 1: with a single subspace there is no redundancy between subspaces")
        means.append(pairs.mean())
    return float(torch.stack(means).mean())

"""How redundant a trained adapter is: a heat map as in the paper's Figure 1a, and numbers that sum it up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from regularizers.columns import cosines
from regularizers.subspaces import Subspaces, with_pairs

DEAD = 0.01  # of the largest subspace of the layer


@torch.no_grad()
def redundancy(subspaces: Subspaces) -> Tensor:
    """The redundancy of each two subspaces, |cos(s_i, s_j)| over the samples: (r, r) in [0, 1], 1 on the diagonal.

    The paper prints no formula for its Figure 1a. This is our reading, the square root of the term that Eq. 7 sums. A
    subspace that is zero on every sample has zero redundancy, also with itself.
    """
    return cosines(subspaces.activations).abs().clamp(max=1.0)


def mean_redundancy(subspaces: Mapping[str, Subspaces]) -> float:
    """The mean of the off-diagonal entries of `redundancy`, averaged over the layers that have any; in [0, 1].

    Raises:
        ValueError: if there is no layer, or none with two subspaces (a pair).
    """
    if not subspaces:
        raise ValueError("no subspaces: run the model inside `with capture(model) as subspaces:` first")
    means = [mean_off_diagonal(redundancy(layer)) for layer in with_pairs(subspaces).values()]
    return sum(means) / len(means)


def mean_off_diagonal(matrix: Tensor | Sequence[Sequence[float]]) -> float:
    """The mean of the entries off the diagonal of a heat map (r, r), a tensor or lists as in a run's redundancy.json.

    Raises:
        ValueError: if it is not square, or r < 2.
    """
    values = torch.as_tensor(matrix).cpu().double()
    if values.ndim != 2 or values.shape[0] != values.shape[1]:
        raise ValueError(f"redundancy: expected a square matrix of shape (r, r); received shape {tuple(values.shape)}")
    if len(values) < 2:
        raise ValueError(f"redundancy: a matrix of shape {tuple(values.shape)} has no pair of subspaces")
    return float(values[~torch.eye(len(values), dtype=torch.bool)].mean())


@torch.no_grad()
def singular_values(subspaces: Subspaces) -> Tensor:
    """The r singular values of the update ``activations @ basis`` (N, d_out), descending, without building it: (r,).

    In float64. Fewer than r where N or d_out is smaller.
    """
    left = torch.linalg.qr(subspaces.activations.double(), mode="r").R
    right = torch.linalg.qr(subspaces.basis.double().T, mode="r").R
    return torch.linalg.svdvals(left @ right.T)


def effective_rank(subspaces: Subspaces) -> float:
    """How many dimensions the update uses, between 1 and r: the exponential of the entropy of its singular values.

    Roy and Vetterli, "The effective rank", EUSIPCO 2007. Zero for an update that is zero, as at B = 0.
    """
    values = singular_values(subspaces)
    if not values.sum() > 0:
        return 0.0
    share = values / values.sum()
    return float(torch.special.entr(share).sum().exp())


@torch.no_grad()
def dead_components(subspaces: Subspaces) -> int:
    """How many subspaces add next to nothing: |s_i| |b_i| at most 1 % of the layer's largest; all r if that is zero."""
    activations, basis = subspaces.activations.double(), subspaces.basis.double()
    sizes = activations.norm(dim=0) * basis.norm(dim=1)
    return int((sizes <= DEAD * sizes.max()).sum())

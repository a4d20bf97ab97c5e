"""Eq. 5-8 of the paper written as they are printed, on features built in full: the oracle of the closed forms."""

from __future__ import annotations

import torch
from torch import Tensor


def features(activations: Tensor, basis: Tensor) -> Tensor:
    """(r, N, d_out): the part of each subspace."""
    return torch.stack([torch.outer(activations[:, i], basis[i]) for i in range(len(basis))])


def pairs(rank: int) -> list[tuple[int, int]]:
    return [(i, j) for i in range(rank) for j in range(i + 1, rank)]


def equation_5(activations: Tensor, basis: Tensor, beta: float = 1.0) -> Tensor:
    h = features(activations, basis)
    terms = [torch.exp(-beta * (h[i] - h[j]).square().sum(dim=1)).mean() for i, j in pairs(len(h))]
    return sum(terms, activations.new_zeros(()))


def equation_6(activations: Tensor, basis: Tensor) -> Tensor:
    h = features(activations, basis)
    terms = [
        ((h[i] * h[j]).sum(dim=1) / (h[i].norm(dim=1) * h[j].norm(dim=1))).mean()
        for i, j in pairs(len(h))
    ]  # fmt: skip
    return sum(terms, activations.new_zeros(()))


def equation_7(activations: Tensor, basis: Tensor, transposed: bool = False) -> Tensor:
    """dH_i is (d_out, N); transposed: (N, d_out)."""
    h = features(activations, basis)
    h = h if transposed else h.transpose(1, 2)
    terms = [(h[i] @ h[j].T).norm() ** 2 / ((h[i] @ h[i].T).norm() * (h[j] @ h[j].T).norm()) for i, j in pairs(len(h))]
    return sum(terms, activations.new_zeros(()))


def equation_8(activations: Tensor, basis: Tensor, sigma_fraction: float = 1.0) -> Tensor:
    """With N x N kernels and the median over all pairs of samples."""
    h = features(activations, basis)
    count = h.shape[1]
    p, q = torch.triu_indices(count, count, offset=1)
    centring = torch.eye(count, dtype=h.dtype) - 1 / count
    kernels = []
    for part in h:
        square = (part[:, None, :] - part[None, :, :]).square().sum(dim=2)
        sigma = sigma_fraction * square[p, q].sqrt().median()
        kernels.append(torch.exp(-square / (2 * sigma**2)) @ centring)
    terms = [
        (kernels[i] @ kernels[j]).trace()
        / ((kernels[i] @ kernels[i]).trace() * (kernels[j] @ kernels[j]).trace()).sqrt()
        for i, j in pairs(len(h))
    ]
    return sum(terms, activations.new_zeros(()))


def squared_correlation(activations: Tensor, basis: Tensor) -> Tensor:
    """Eq. 7 on centred features: the square of Pearson's correlation of two activations, summed over pairs."""
    correlation = torch.corrcoef(activations.T)
    return sum((correlation[i, j].square() for i, j in pairs(activations.shape[1])), activations.new_zeros(()))


def frobenius_overlap(activations: Tensor, basis: Tensor) -> Tensor:
    h = features(activations, basis)
    terms = [((h[i] * h[j]).sum() / (h[i].norm() * h[j].norm())).abs() for i, j in pairs(len(h))]
    return sum(terms, activations.new_zeros(()))

"""Eq. 5-8 of the ReSoRA paper as they are printed, to show what the closed forms of `regularizers` save.

The features of every subspace are built in full, (r, N, d_out), and so are the products (d_out, d_out) of Eq. 7 and the
kernels (N, N) of Eq. 8. Each term is computed once where a term recurs, and the trace of a product of two matrices is
summed without the product: what a careful reader would write. Defined off B = 0 only, as the equations are.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor


def equation_5(activations: Tensor, basis: Tensor, beta: float = 1.0) -> Tensor:
    """Euclidean: (1/N) sum_n sum_{i<j} exp(-beta |dh_i - dh_j|^2), for (N, r) and (r, d_out)."""
    features = _features(activations, basis)
    terms = [(left - right).square().sum(-1).mul(-beta).exp().mean() for left, right in combinations(features, 2)]
    return torch.stack(terms).sum()


def equation_6(activations: Tensor, basis: Tensor) -> Tensor:
    """Cosine: (1/N) sum_n sum_{i<j} cos(dh_i, dh_j)."""
    features = _features(activations, basis)
    terms = [F.cosine_similarity(left, right, dim=-1, eps=0).mean() for left, right in combinations(features, 2)]
    return torch.stack(terms).sum()


def equation_7(activations: Tensor, basis: Tensor) -> Tensor:
    """Linear: sum_{i<j} |dH_i dH_j^T|_F^2 / (|dH_i dH_i^T|_F |dH_j dH_j^T|_F), with dH_i (d_out, N)."""
    features = [feature.T for feature in _features(activations, basis)]
    own = [(feature @ feature.T).norm() for feature in features]
    terms = [
        (features[i] @ features[j].T).norm().square() / (own[i] * own[j]) for i, j in combinations(range(len(own)), 2)
    ]
    return torch.stack(terms).sum()


def equation_8(activations: Tensor, basis: Tensor, sigma_fraction: float = 1.0) -> Tensor:
    """Nonlinear: sum_{i<j} tr(K_i M K_j M) / sqrt(tr((K_i M)^2) tr((K_j M)^2)), with K_i (N, N)."""
    count = len(activations)
    pairs = torch.triu_indices(count, count, offset=1, device=activations.device)
    identity = torch.eye(count, device=activations.device, dtype=activations.dtype)
    centring = identity - 1 / count
    centred = []
    for features in _features(activations, basis):
        distances = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")
        sigma = sigma_fraction * distances[pairs[0], pairs[1]].median()
        centred.append((-distances.square() / (2 * sigma.square())).exp() @ centring)
    own = [(kernel * kernel.T).sum() for kernel in centred]
    terms = [(centred[i] * centred[j].T).sum() / (own[i] * own[j]).sqrt() for i, j in combinations(range(len(own)), 2)]
    return torch.stack(terms).sum()


def _features(activations: Tensor, basis: Tensor) -> Tensor:
    return activations.T[:, :, None] * basis[:, None, :]  # (r, N, d_out)


# By the name of the closed form in REGULARIZERS.
NAIVE: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "euclidean": ("Eq. 5", equation_5),
    "cosine": ("Eq. 6", equation_6),
    "linear": ("Eq. 7", equation_7),
    "nonlinear": ("Eq. 8", equation_8),
}

"""The Euclidean pairwise measure, Eq. 5 of the ReSoRA paper."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from regularizers.eager import ValueAndGradients, with_gradients

CHUNK = 1 << 19  # elements of (samples, r, r) at a time: they stay in the processor's cache
LARGEST = 1e18  # of a feature; its square still has a place in float32


def euclidean(activations: Tensor, basis: Tensor, *, beta: float = 1.0) -> Tensor:
    r"""How close the features of two subspaces lie, averaged over samples and summed over pairs (Eq. 5).

    .. math:: \frac{1}{N} \sum_n \sum_{i<j} \exp(-\beta \|s_{ni} b_i - s_{nj} b_j\|^2)

    in [0, r (r - 1) / 2]. With the Gram matrix G of the basis the distance is
    :math:`s_{ni}^2 G_{ii} + s_{nj}^2 G_{jj} - 2 s_{ni} s_{nj} G_{ij}`; no tensor of (r, N, d_out) is built. The
    gradient reaches both arguments (A and B) and is zero to both at B = 0, where all features coincide.

    Args:
        activations (Tensor): ``(..., N, r)``, any float dtype; leading dimensions are layers.
        basis (Tensor): ``(..., r, d_out)``.
        beta (float): sensitivity, in 1 / squared feature units. Default: 1; the paper gives none.

    Returns:
        Tensor: ``(...)``, in float32 at least.

    Raises:
        ValueError: if beta is not positive.
    """
    if beta <= 0:
        raise ValueError(f"beta is {beta}; expected a positive number, the sensitivity of Eq. 5")
    return with_gradients(partial(_euclidean, beta=beta), activations, basis)


def _euclidean(activations: Tensor, basis: Tensor, beta: float) -> ValueAndGradients:
    """Of one layer: (N, r), (r, d_out)."""
    result = torch.promote_types(activations.dtype, torch.float32)
    exact = result if activations.device.type == "mps" else torch.float64
    count, rank = activations.shape
    vectors = basis.to(exact)
    gram = vectors @ vectors.T
    norms = gram.diagonal().sqrt()
    cosines = gram / (norms[:, None] * norms).where(norms[:, None] * norms > 0, torch.ones_like(gram))
    sign = torch.where(cosines < 0, -1.0, 1.0).to(result)
    apart = 2 * (1 - cosines.abs()).clamp(min=0).to(result)

    # Sums over samples, with activations and Gram matrix of magnitude 1: their products have no place in float32.
    peak = activations.abs().amax().to(exact) if count else torch.ones((), dtype=exact, device=activations.device)
    peak = peak.where(peak > 0, torch.ones_like(peak))
    steepest = gram.abs().amax().where(gram.any(), torch.ones_like(peak))
    unit_gram = (gram / steepest).to(result)
    total = torch.zeros((), dtype=result, device=activations.device)
    products = torch.zeros(rank, rank, dtype=result, device=activations.device)
    to_activations = []
    for chunk in activations.split(max(1, CHUNK // rank**2)):
        scaled = chunk.to(exact)
        unit = (scaled / peak).to(result)
        lengths = (scaled * norms).clamp(-LARGEST, LARGEST).to(result)  # of the features, with the activations' signs
        first, second = lengths[:, :, None], lengths[:, None, :] * sign
        # |h_i - h_j|^2 without the cancellation of its three terms: i and j are first turned to the same side.
        distance = (first - second).square_().addcmul_(first * second, apart).clamp_(min=0)
        close = distance.mul_(-beta).exp_()
        close.diagonal(dim1=1, dim2=2).zero_()
        rows = close.sum(dim=2)
        total += rows.sum()
        across = (close * unit_gram) @ unit[:, :, None]
        to_activations.append(unit * unit_gram.diagonal() * rows - across[:, :, 0])
        products += torch.einsum("ni,nij,nj->ij", unit, close, unit)
        products.diagonal().sub_((unit.square() * rows).sum(dim=0))
    scale = 2 * beta / max(count, 1)
    gradient = -torch.cat(to_activations).to(exact) * (scale * peak * steepest)
    to_basis = (products.to(exact) * (scale * peak**2)) @ vectors
    return total / (2 * max(count, 1)), _finite(gradient, activations.dtype), _finite(to_basis, basis.dtype)


def _finite(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    largest = torch.finfo(dtype).max
    return gradient.clamp(-largest, largest).to(dtype)

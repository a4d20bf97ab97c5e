"""The Euclidean pairwise measure, Eq. 5 of the ReSoRA paper."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from regularizers.eager import ValueAndGradients, with_gradients

CHUNK = 1 << 19  # elements of (pairs, samples) at a time: they stay in the processor's cache
LARGEST = 1e18  # length of a feature whose square still has a place in float32


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
    if not beta > 0:
        raise ValueError(f"beta is {beta}; expected a positive number, the sensitivity of Eq. 5")
    return with_gradients(partial(_euclidean, beta=beta), activations, basis)


def _euclidean(activations: Tensor, basis: Tensor, beta: float) -> ValueAndGradients:
    """Of several layers at once: (L, N, r), (L, r, d_out). A pair is i < j, P of them; inside, a row is a subspace."""
    result = torch.promote_types(activations.dtype, torch.float32)
    exact = result if activations.device.type == "mps" else torch.float64
    layers, count, rank = activations.shape
    i, j = torch.triu_indices(rank, rank, offset=1, device=activations.device)
    vectors = basis.to(exact)
    gram = vectors @ vectors.mT
    norms = gram.diagonal(dim1=1, dim2=2).sqrt()  # (L, r)
    both = norms[:, i] * norms[:, j]
    cosines = gram[:, i, j] / both.where(both > 0, torch.ones_like(both))
    sign = torch.where(cosines < 0, -1.0, 1.0).to(result)[..., None]  # (L, P, 1)
    apart = 2 * (1 - cosines.abs()).clamp(min=0).to(result)[..., None]

    # Sums over samples, with activations and Gram matrix of magnitude 1: their products have no place in float32.
    peak = activations.abs().amax(dim=(1, 2)).to(exact) if count else gram.new_ones(layers)
    peak = peak.where(peak > 0, torch.ones_like(peak))[:, None, None]
    longest = activations.abs().amax(dim=1).to(exact) * norms if count else norms.new_zeros(norms.shape)
    longest = longest.amax(dim=1)[:, None, None]
    shrink = (LARGEST / longest).clamp(max=1)  # of the features, and beta grows
    steepest = gram.abs().amax(dim=(1, 2))
    steepest = steepest.where(steepest > 0, torch.ones_like(steepest))[:, None, None]
    steepness = (-beta / shrink.square()).clamp(min=-torch.finfo(result).max).to(result)
    unit_gram = (gram / steepest).to(result)
    of_pairs, own = unit_gram[:, i, j, None], unit_gram.diagonal(dim1=1, dim2=2)[..., None]
    pair = torch.arange(len(i), device=activations.device)
    first_of, second_of = torch.zeros(2, rank, len(i), dtype=result, device=activations.device)  # (r, P) each
    first_of[i, pair] = second_of[j, pair] = 1.0

    def of(these: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Of some layers: the sum over pairs and samples, and what the gradients are made of."""
        total, to_activations = norms.new_zeros(len(norms[these]), dtype=result), []
        products = unit_gram.new_zeros(unit_gram[these].shape)
        for chunk in activations[these].split(max(1, CHUNK // max(len(i), 1)), dim=1):
            scaled = chunk.mT.to(exact)  # (L, r, samples)
            unit = (scaled / peak[these]).to(result)
            # Lengths of the features, with the signs of their activations.
            lengths = (scaled * (norms[these, :, None] * shrink[these])).to(result)
            left, right = lengths[:, i], lengths[:, j] * sign[these]  # (L, P, samples)
            # |h_i - h_j|^2 without the cancellation of its three terms: i and j are first turned to the same side.
            distance = (left - right).square_().addcmul_(left.mul_(right), apart[these]).clamp_(min=0)
            close = distance.mul_(steepness[these]).exp_()
            rows = (first_of + second_of) @ close  # (L, r, samples): the sum over the pairs of each subspace
            total += close.sum(dim=(1, 2))
            left, right = unit[:, i], unit[:, j]
            products[:, i, j] += (close * left).mul_(right).sum(dim=2)
            products.diagonal(dim1=1, dim2=2).sub_((unit.square() * rows).sum(dim=2))
            close.mul_(of_pairs[these])
            across = (first_of @ right.mul_(close)).add_(second_of @ left.mul_(close))
            to_activations.append((rows.mul_(unit).mul_(own[these]) - across).mT)
        return total, products + products.triu(diagonal=1).mT, torch.cat(to_activations, dim=1)

    at_once = max(1, CHUNK // max(1, len(i) * count))
    groups = [slice(start, start + at_once) for start in range(0, layers, at_once)]
    totals, products, to_activations = (torch.cat(parts) for parts in zip(*map(of, groups), strict=True))
    scale = 2 * beta / max(count, 1)
    gradient = -to_activations.to(exact) * (scale * peak * steepest)
    to_basis = (products.to(exact) * (scale * peak**2)) @ vectors
    return totals / max(count, 1), _finite(gradient, activations.dtype), _finite(to_basis, basis.dtype)


def _finite(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    largest = torch.finfo(dtype).max
    return gradient.clamp(-largest, largest).to(dtype)

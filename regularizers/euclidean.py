"""The Euclidean pairwise measure, Eq. 5 of the ReSoRA paper."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from regularizers.eager import ValueAndGradients, at_once, kept, with_gradients

CHUNK = 1 << 19  # elements of (pairs, samples) at a time: they stay in a CPU's cache
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


class _Pairs(NamedTuple):
    """The P pairs i < j of r subspaces."""

    i: Tensor
    """(P,)"""
    j: Tensor
    of_i: Tensor
    """(r, P), 1 where the subspace is the pair's i: the sum over the pairs of each subspace, as a product."""
    of_j: Tensor


class _Layers(NamedTuple):
    """Several layers at once, for the sums over their samples: products of what is given have no place in float32."""

    activations: Tensor
    """(L, N, r), as given."""
    peak: Tensor
    """(L, 1, 1), the largest magnitude of an activation; activations / peak are what gradients are made of."""
    stretch: Tensor
    """(L, r, 1), the lengths of the basis vectors, shrunk so that no feature is longer than LARGEST."""
    steepness: Tensor
    """(L, 1, 1), -beta in units of features so shrunk."""
    sign: Tensor
    """(L, P, 1), of the cosine of a pair's basis vectors."""
    apart: Tensor
    """(L, P, 1), |u - v|^2 of their unit vectors turned to the same side."""
    gram_of_pairs: Tensor
    """(L, P, 1), G_ij of the Gram matrix of magnitude 1."""
    gram_own: Tensor
    """(L, r, 1), its diagonal."""


def _euclidean(activations: Tensor, basis: Tensor, beta: float) -> ValueAndGradients:
    """Of several layers at once: (L, N, r), (L, r, d_out). A pair is i < j, P of them; inside, a row is a subspace."""
    result = torch.promote_types(activations.dtype, torch.float32)
    exact = result if activations.device.type == "mps" else torch.float64
    count, rank = activations.shape[1:]
    pairs = _pairs(rank, result, activations.device)
    vectors = basis.to(exact)
    gram = vectors @ vectors.mT
    steepest = _or_one(gram.abs().amax(dim=(1, 2)))[:, None, None]
    layers = _layers(activations, gram, (gram / steepest).to(result), pairs, beta)

    together = max(1, at_once(CHUNK, activations.device) // max(1, len(pairs.i) * count))
    groups = zip(*(field.split(together) for field in layers), strict=True)
    sums = zip(*(_sums(_Layers(*group), pairs) for group in groups), strict=True)
    totals, products, to_activations = (torch.cat(parts) for parts in sums)
    scale = 2 * beta / max(count, 1)
    gradient = -to_activations.to(exact) * (scale * layers.peak * steepest)
    to_basis = (products.to(exact) * (scale * layers.peak**2)) @ vectors
    return totals / max(count, 1), kept(gradient, activations.dtype), kept(to_basis, basis.dtype)


def _pairs(rank: int, dtype: torch.dtype, device: torch.device) -> _Pairs:
    i, j = torch.triu_indices(rank, rank, offset=1, device=device)
    pair = torch.arange(len(i), device=device)
    of_i, of_j = torch.zeros(2, rank, len(i), dtype=dtype, device=device)
    of_i[i, pair] = of_j[j, pair] = 1.0
    return _Pairs(i, j, of_i, of_j)


def _layers(activations: Tensor, gram: Tensor, unit_gram: Tensor, pairs: _Pairs, beta: float) -> _Layers:
    """From the Gram matrices (L, r, r) of the basis, in the exact type, and of magnitude 1, in the result's."""
    exact, result = gram.dtype, unit_gram.dtype
    largest = activations.abs().amax(dim=1).to(exact) if activations.shape[1] else torch.zeros_like(gram[:, 0])
    norms = gram.diagonal(dim1=1, dim2=2).sqrt()  # (L, r)
    shrink = (LARGEST / (largest * norms).amax(dim=1)[:, None, None]).clamp(max=1)
    cosines = gram[:, pairs.i, pairs.j] / _or_one(norms[:, pairs.i] * norms[:, pairs.j])
    return _Layers(
        activations=activations,
        peak=_or_one(largest.amax(dim=1))[:, None, None],
        stretch=norms[..., None] * shrink,
        steepness=(-beta / shrink.square()).clamp(min=-torch.finfo(result).max).to(result),
        sign=torch.where(cosines < 0, -1.0, 1.0).to(result)[..., None],
        apart=2 * (1 - cosines.abs()).clamp(min=0).to(result)[..., None],
        gram_of_pairs=unit_gram[:, pairs.i, pairs.j, None],
        gram_own=unit_gram.diagonal(dim1=1, dim2=2)[..., None],
    )


def _sums(layers: _Layers, pairs: _Pairs) -> tuple[Tensor, Tensor, Tensor]:
    """Over samples, of c = exp(-beta |h_i - h_j|^2) and what the gradients are made of, without their factors.

    Returns:
        The sum of c over pairs and samples (L,); sums over samples (L, r, r) of c s_i s_j, and on the diagonal of
        -c s_i^2 for each pair of i; for each sample (L, N, r) the sum over the pairs of i of c (s_i G_ii - s_j G_ij).
    """
    exact, result = layers.peak.dtype, layers.gram_own.dtype
    total = layers.gram_own.new_zeros(len(layers.peak))
    products = layers.gram_own.new_zeros(len(layers.peak), len(pairs.of_i), len(pairs.of_i))
    to_activations = []
    samples = max(1, at_once(CHUNK, total.device) // max(len(pairs.i), 1))
    for chunk in layers.activations.split(samples, dim=1):
        scaled = chunk.mT.to(exact)  # (L, r, samples)
        unit = (scaled / layers.peak).to(result)
        close = _closeness((scaled * layers.stretch).to(result), layers, pairs)  # (L, P, samples)
        total += close.sum(dim=(1, 2))
        of_subspace = (pairs.of_i + pairs.of_j) @ close  # (L, r, samples): the sum over the pairs of each subspace
        unit_i, unit_j = unit[:, pairs.i], unit[:, pairs.j]
        products[:, pairs.i, pairs.j] += (close * unit_i).mul_(unit_j).sum(dim=2)
        products.diagonal(dim1=1, dim2=2).sub_((unit.square() * of_subspace).sum(dim=2))
        weights = close.mul_(layers.gram_of_pairs)  # from here on in the memory of what is not needed any more
        across = (pairs.of_i @ unit_j.mul_(weights)).add_(pairs.of_j @ unit_i.mul_(weights))
        to_activations.append((of_subspace.mul_(unit).mul_(layers.gram_own) - across).mT)
    return total, products + products.triu(diagonal=1).mT, torch.cat(to_activations, dim=1)


def _closeness(lengths: Tensor, layers: _Layers, pairs: _Pairs) -> Tensor:
    """exp(-beta |h_i - h_j|^2), (L, P, samples), of features of these lengths, (L, r, samples), signed as activations.

    Without the cancellation of the square's three terms: i and j are first turned to the same side.
    """
    left, right = lengths[:, pairs.i], lengths[:, pairs.j] * layers.sign
    distance = (left - right).square_().addcmul_(left.mul_(right), layers.apart).clamp_(min=0)
    return distance.mul_(layers.steepness).exp_()


def _or_one(tensor: Tensor) -> Tensor:
    """1 in place of what is not positive, to divide by."""
    return tensor.where(tensor > 0, torch.ones_like(tensor))

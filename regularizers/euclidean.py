"""The Euclidean pairwise measure, Eq. 5 of the ReSoRA paper."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from regularizers.eager import eager_gradient

CHUNK = 1 << 21  # elements of (samples, pairs) at a time


def euclidean(activations: Tensor, basis: Tensor, *, beta: float = 1.0) -> Tensor:
    r"""How close the features of two subspaces lie, averaged over samples and summed over pairs (Eq. 5).

    .. math:: \frac{1}{N} \sum_n \sum_{i<j} \exp(-\beta \|s_{ni} b_i - s_{nj} b_j\|^2)

    in [0, r (r - 1) / 2]. With the Gram matrix G of the basis the distance is
    :math:`s_{ni}^2 G_{ii} + s_{nj}^2 G_{jj} - 2 s_{ni} s_{nj} G_{ij}`; no tensor of (r, N, d_out) is built. The
    gradient reaches both arguments (A and B) and is zero to both at B = 0, where all features coincide.

    Args:
        activations (Tensor): ``(N, r)``, any float dtype. The distance is computed in float64 where the device has it:
            it is a small difference of large numbers.
        basis (Tensor): ``(r, d_out)``.
        beta (float): sensitivity, in 1 / squared feature units. Default: 1; the paper gives none.

    Returns:
        Tensor: a scalar, in float32 at least.

    Raises:
        ValueError: if beta is not positive.
    """
    if beta <= 0:
        raise ValueError(f"beta is {beta}; expected a positive number, the sensitivity of Eq. 5")
    pairs = max(1, activations.shape[1] * (activations.shape[1] - 1) // 2)
    sums = [
        eager_gradient(partial(_sum, beta=beta), chunk, basis)
        for chunk in activations.split(max(1, CHUNK // pairs))
    ]  # fmt: skip
    return torch.stack(sums).sum() / max(len(activations), 1)


def _sum(activations: Tensor, basis: Tensor, beta: float) -> Tensor:
    result = torch.promote_types(activations.dtype, torch.float32)
    wide = result if activations.device.type == "mps" else torch.float64
    with torch.autocast(activations.device.type, enabled=False):
        scaled, vectors = activations.to(wide), basis.to(wide)
        gram = vectors @ vectors.T
        i, j = torch.triu_indices(len(gram), len(gram), offset=1, device=gram.device)
        square = scaled.square() * gram.diagonal()
        distance = square[:, i] + square[:, j] - 2 * scaled[:, i] * scaled[:, j] * gram[i, j]
        return distance.clamp(min=0).mul(-beta).exp().sum().to(result)

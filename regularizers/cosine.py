"""The cosine pairwise measure, Eq. 6 of the ReSoRA paper."""

from __future__ import annotations

import torch
from torch import Tensor

from regularizers.columns import cosines, sum_of_pairs


def cosine(activations: Tensor, basis: Tensor) -> Tensor:
    r"""The cosine between the features of two subspaces, averaged over samples and summed over pairs (Eq. 6).

    The features of one sample are :math:`\Delta h_i = s_{ni} b_i`, so their cosine is that of the basis vectors with
    the sign of the activations:

    .. math:: \sum_{i<j} \cos(b_i, b_j) \; \frac{1}{N} \sum_n \mathrm{sign}(s_{ni} s_{nj})

    in [-r (r - 1) / 2, r (r - 1) / 2]. The signs do not move under a gradient, so it reaches the basis (B) only; the
    minimum of a pair is at -1 or 1, opposite directions, not orthogonal ones. Zero features count zero.

    Args:
        activations (Tensor): ``(..., N, r)``, any float dtype; leading dimensions are layers.
        basis (Tensor): ``(..., r, d_out)``.

    Returns:
        Tensor: ``(...)``, in float32 at least.
    """
    directions = cosines(basis.mT)
    signs = activations.detach().sign().to(directions.dtype)  # of each: a product of 1e-30s would be 0
    with torch.autocast(signs.device.type, enabled=False):
        return sum_of_pairs(directions * (signs.mT @ signs) / max(signs.shape[-2], 1))

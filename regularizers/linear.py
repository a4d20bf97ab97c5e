"""The linear set-to-set measure, Eq. 7 of the ReSoRA paper: its default."""

from __future__ import annotations

import torch
from torch import Tensor


def linear(activations: Tensor, basis: Tensor | None = None) -> Tensor:
    r"""How much r subspaces overlap on N samples: :math:`\sum_{i<j} \cos^2(s_i, s_j)`, in [0, r (r - 1) / 2].

    Eq. 7 compares the feature matrices :math:`\Delta H_i = b_i s_i^T` (d_out x N) of rank 1. In

    .. math:: \|\Delta H_i \Delta H_j^T\|_F^2 / (\|\Delta H_i \Delta H_i^T\|_F \|\Delta H_j \Delta H_j^T\|_F)

    the basis cancels, which leaves the squared cosine of the activations over the samples: uncentred linear CKA. This
    form is exact, never builds a (d_out, N) or (d_out, d_out) tensor, and is defined where the printed one is 0 / 0, at
    LoRA's B = 0. Its gradient reaches the activations only. A pair with an all-zero subspace counts zero.

    Args:
        activations (Tensor): ``(N, r)``, any float dtype; computed in float32 at least.
        basis (Tensor): ``(r, d_out)``; taken for the common signature, it has no influence.

    Returns:
        Tensor: a scalar.
    """
    return cosines(activations).square().triu(diagonal=1).sum()


def cosines(columns: Tensor) -> Tensor:
    """The cosine between each two of r columns: (N, r) -> (r, r), in float32 at least; 0 where a column is zero."""
    with torch.autocast(columns.device.type, enabled=False):
        columns = columns.to(torch.promote_types(columns.dtype, torch.float32))
        largest = columns.detach().abs().amax(dim=0) if len(columns) else columns.new_zeros(columns.shape[1])
        # Columns of magnitude 1 first: the square of 1e-30 or 1e30 has no place in float32.
        columns = columns / largest.where(largest > 0, torch.ones_like(largest))
        gram = columns.T @ columns
        square = gram.diagonal()
        norms = square.where(square > 0, torch.ones_like(square)).sqrt()  # sqrt'(0) is infinite
        return gram / (norms[:, None] * norms[None, :])

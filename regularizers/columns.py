"""Cosines between columns, which four of the five measures are made of, and the precision that they are computed in."""

from __future__ import annotations

import torch
from torch import Tensor

HALF = torch.finfo(torch.float16).max


def cosines(columns: Tensor, centered: bool = False) -> Tensor:
    """The cosine between each two of r columns: (..., N, r) -> (..., r, r), float32 at least; 0 where one is zero.

    Args:
        columns: ``(..., N, r)``, any float dtype and any magnitude; leading dimensions are layers.
        centered: subtract each column's mean first, which makes the cosine Pearson's correlation. A constant column
            then counts as zero.
    """
    with torch.autocast(columns.device.type, enabled=False):
        given = columns.dtype
        columns = columns.to(torch.promote_types(given, torch.float32))
        if given == torch.float16 and columns.requires_grad:  # small columns have gradients that it has no place for
            columns.register_hook(lambda gradient: gradient.clamp(-HALF, HALF))
        largest = _largest(columns)
        # Columns of magnitude 1 first: the square of 1e-30 or 1e30 has no place in float32.
        columns = columns / largest.where(largest > 0, torch.ones_like(largest))
        if centered and columns.shape[-2]:
            columns = columns - columns.mean(dim=-2, keepdim=True)
            spread = _largest(columns)
            varies = spread > 8 * torch.finfo(columns.dtype).eps  # what is left of a constant column is rounding
            columns = columns * (varies / spread.where(varies, torch.ones_like(spread)))
        gram = columns.mT @ columns
        square = gram.diagonal(dim1=-2, dim2=-1)
        norms = square.where(square > 0, torch.ones_like(square)).sqrt()  # sqrt'(0) is infinite
        return gram / (norms[..., :, None] * norms[..., None, :])


def sum_of_pairs(matrix: Tensor) -> Tensor:
    """The sum over i < j of (..., r, r) matrices: (...)."""
    return matrix.triu(diagonal=1).sum(dim=(-2, -1))


def _largest(columns: Tensor) -> Tensor:
    """The largest magnitude of each column: (..., N, r) -> (..., 1, r)."""
    if not columns.shape[-2]:
        return columns.new_zeros(*columns.shape[:-2], 1, columns.shape[-1])
    return columns.detach().abs().amax(dim=-2, keepdim=True)

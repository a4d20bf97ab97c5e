"""A measure of our own, not in the paper: how much two rank-1 updates overlap as matrices."""

from __future__ import annotations

from torch import Tensor

from regularizers.columns import cosines, sum_of_pairs


def overlap(activations: Tensor, basis: Tensor) -> Tensor:
    r"""The sum over pairs of :math:`|\cos(s_i, s_j) \cos(b_i, b_j)|`, in [0, r (r - 1) / 2]. Not from the paper.

    It is the absolute cosine between two whole feature matrices :math:`s_i b_i^T` (N x d_out) in the Frobenius inner
    product, :math:`\langle s_i b_i^T, s_j b_j^T \rangle = (s_i^T s_j)(b_i^T b_j)`. Zero means that the two updates are
    orthogonal, which either factor can bring about; unlike Eq. 6 and Eq. 7 it moves A and B together. A pair with a
    zero factor counts zero, so there is no gradient at LoRA's B = 0.

    Args:
        activations (Tensor): ``(..., N, r)``, any float dtype; leading dimensions are layers.
        basis (Tensor): ``(..., r, d_out)``.

    Returns:
        Tensor: ``(...)``, in float32 at least.
    """
    return sum_of_pairs((cosines(activations) * cosines(basis.mT)).abs())

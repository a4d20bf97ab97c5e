"""The linear set-to-set measure, Eq. 7 of the ReSoRA paper: its default."""

from __future__ import annotations

from torch import Tensor

from regularizers.columns import cosines, sum_of_pairs


def linear(
    activations: Tensor, basis: Tensor | None = None, *, centered: bool = False, transposed: bool = False
) -> Tensor:
    r"""How much r subspaces overlap on N samples: :math:`\sum_{i<j} \cos^2(s_i, s_j)`, in [0, r (r - 1) / 2].

    Eq. 7 compares the feature matrices :math:`\Delta H_i = b_i s_i^T` of rank 1. They are d_out x N, as their columns
    are the :math:`\Delta h_i` of Eq. 4; the printed d_in x N is a misprint. In

    .. math:: \|\Delta H_i \Delta H_j^T\|_F^2 / (\|\Delta H_i \Delta H_i^T\|_F \|\Delta H_j \Delta H_j^T\|_F)

    the basis cancels, which leaves the squared cosine of the activations over the samples: uncentred linear CKA. This
    form is exact, never builds a (d_out, N) or (d_out, d_out) tensor, and is defined where the printed one is 0 / 0, at
    LoRA's B = 0. A pair with an all-zero subspace counts zero.

    The gradient reaches the activations (A, and the layers below), never the basis (B); `transposed` the other way.

    Args:
        activations (Tensor): ``(..., N, r)``, any float dtype; leading dimensions are layers.
        basis (Tensor): ``(..., r, d_out)``; without influence, unless `transposed`.
        centered (bool): subtract each activation's mean over the samples: linear CKA as Kornblith et al. define it.
        transposed (bool): read Eq. 7 with :math:`\Delta H_i^T \Delta H_j` (N x N), which a reader may take it for: the
            activations cancel instead, and :math:`\sum_{i<j} \cos^2(b_i, b_j)` is left.

    Returns:
        Tensor: ``(...)``, in float32 at least.

    Raises:
        ValueError: for `transposed` without a basis, or together with `centered`.
    """
    if not transposed:
        return sum_of_pairs(cosines(activations, centered=centered).square())
    if basis is None or centered:
        raise ValueError(
            f"transposed=True compares the basis: give one, uncentred (basis {basis}, centered {centered})"
        )
    return sum_of_pairs(cosines(basis.mT).square())

"""The nonlinear set-to-set measure, Eq. 8 of the ReSoRA paper, in time and memory linear in the samples."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from regularizers.columns import sum_of_pairs
from regularizers.eager import eager_gradient
from regularizers.median import median_pair

SPACING = 0.55  # of the bumps, in bandwidths: relative error of the kernel 2 exp(-pi^2 / (2 spacing^2)) = 2e-7
MARGIN = 2.75  # bandwidths of bumps beyond the outermost samples: what is cut off is below 1e-7
REACH = 6.0  # bandwidths at which the kernel is zero, exp(-18)


def nonlinear(activations: Tensor, basis: Tensor | None = None, *, sigma_fraction: float = 1.0) -> Tensor:
    r"""How alike two subspaces arrange the samples: RBF-kernel CKA, summed over pairs (Eq. 8).

    .. math:: \sum_{i<j} \mathrm{tr}(K_i M K_j M) / \sqrt{\mathrm{tr}((K_i M)^2) \, \mathrm{tr}((K_j M)^2)}

    in [0, r (r - 1) / 2], with :math:`K_i(p, q) = \exp(-\|\Delta h_i^p - \Delta h_i^q\|^2 / (2 \sigma_i^2))` and the
    centring matrix M. The bandwidth :math:`\sigma_i` is a fraction of the median distance of two samples of that
    subspace (the lower median, as torch's), so the length of the basis vector cancels: the kernel is a one-dimensional
    Gaussian of the activations, whatever their scale, and is defined at B = 0. A subspace in which half of the pairs
    coincide has no bandwidth; its pairs count zero.

    No N x N kernel is built. A Gaussian is the product of two Gaussian bumps, summed over their centres on a grid,

    .. math:: \exp(-(a - b)^2 / 2) \propto \sum_t \exp(-(a - t)^2) \exp(-(b - t)^2),

    which converges faster than exponentially as the grid gets finer: 20 to 40 bumps a subspace give seven digits. With
    these features a trace is the squared norm of a small matrix. Gaps between samples that are wider than the kernel
    reaches are closed first, so that a few far outliers do not stretch the grid.

    The gradient reaches the activations (A, and the layers below), never the basis (B); it takes the bandwidth's
    dependence on the activations into account.

    Args:
        activations (Tensor): ``(N, r)``, any float dtype; computed in float32 at least.
        basis (Tensor): ``(r, d_out)``; taken for the common signature, it has no influence.
        sigma_fraction (float): bandwidth as a fraction of the median distance. Default: 1; the paper gives none.

    Returns:
        Tensor: a scalar, in float32 at least.

    Raises:
        ValueError: if sigma_fraction is not positive.
    """
    if sigma_fraction <= 0:
        raise ValueError(f"sigma_fraction is {sigma_fraction}; expected a positive fraction of the median distance")
    return eager_gradient(partial(_nonlinear, sigma_fraction=sigma_fraction), activations, activations.new_zeros(()))


def _nonlinear(activations: Tensor, _: Tensor, sigma_fraction: float) -> Tensor:
    with torch.autocast(activations.device.type, enabled=False):
        values = activations.T.to(torch.promote_types(activations.dtype, torch.float32)).contiguous()  # (r, N)
        if values.shape[1] < 2:
            return values.sum() * 0
        values = values - values.detach().median(dim=1, keepdim=True).values
        largest = values.detach().abs().amax(dim=1, keepdim=True)
        values = values / largest.where(largest > 0, torch.ones_like(largest))

        ordered, order = values.detach().sort(dim=1)
        lower, upper = median_pair(ordered)
        median = (values.gather(1, order.gather(1, upper)) - values.gather(1, order.gather(1, lower))).abs()
        alive = median > 0
        scaled = values / (sigma_fraction * median).where(alive, torch.ones_like(median))
        scaled = scaled * alive - _closed_gaps(scaled.detach() * alive, order)
        features = _bumps(scaled).flatten(0, 1)  # (r * bumps, N)
        features = features - features.mean(dim=1, keepdim=True)
        bumps = len(features) // len(values)
        traces = (features @ features.T).square().view(len(values), bumps, len(values), bumps).sum(dim=(1, 3))
        own = traces.diagonal()
        norms = own.where(alive[:, 0], torch.ones_like(own)).sqrt()
        both = alive & alive.T
        return sum_of_pairs(traces / (norms[:, None] * norms[None, :]) * both)


def _closed_gaps(values: Tensor, order: Tensor) -> Tensor:
    """How far to move each of (r, N) values down, so that no gap is wider than the kernel reaches."""
    gaps = values.gather(1, order).diff(dim=1)
    moved = torch.zeros_like(values)
    moved[:, 1:] = (gaps - REACH).clamp(min=0).cumsum(dim=1)
    return torch.zeros_like(values).scatter_(1, order, moved)


def _bumps(values: Tensor) -> Tensor:
    """exp(-(value - centre)^2) for a grid of centres that covers the values: (r, N) -> (r, bumps, N)."""
    start = values.detach().amin(dim=1) - MARGIN
    width = float((values.detach().amax(dim=1) - start).max()) + MARGIN
    centres = start[:, None] + SPACING * torch.arange(int(width / SPACING) + 2, device=values.device)
    return (values[:, None, :] - centres[:, :, None]).square().neg().exp()

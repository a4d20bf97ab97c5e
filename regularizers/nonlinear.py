"""The nonlinear set-to-set measure, Eq. 8 of the ReSoRA paper, in time and memory linear in the samples."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from regularizers.columns import sum_of_pairs
from regularizers.eager import ValueAndGradients, kept, with_gradients
from regularizers.median import median_pair

SPACING = 0.55  # of the bumps, in bandwidths: relative error of the kernel 2 exp(-pi^2 / (2 spacing^2)) = 2e-7
MARGIN = 2.5  # bandwidths of bumps beyond the outermost samples: what is cut off is erfc(sqrt(2) margin) / 2 = 3e-7
REACH = 6.0  # bandwidths at which the kernel is zero, exp(-18)
WIDEST = 128.0  # bandwidths that the samples of a subspace may cover: a bound on the bumps, 240


def nonlinear(activations: Tensor, basis: Tensor | None = None, *, sigma_fraction: float = 1.0) -> Tensor:
    r"""How alike two subspaces arrange the samples: RBF-kernel CKA, summed over pairs (Eq. 8).

    .. math:: \sum_{i<j} \mathrm{tr}(K_i M K_j M) / \sqrt{\mathrm{tr}((K_i M)^2) \, \mathrm{tr}((K_j M)^2)}

    in [0, r (r - 1) / 2], with :math:`K_i(p, q) = \exp(-\|\Delta h_i^p - \Delta h_i^q\|^2 / (2 \sigma_i^2))` and the
    centring matrix M. The bandwidth :math:`\sigma_i` is a fraction of the median distance of two samples of that
    subspace (the lower median, as torch's). Eq. 8 prints one :math:`\sigma`, without an index; a bandwidth for each
    kernel is as in Kornblith et al. (ICML 2019). So the length of the basis vector cancels: the kernel is a
    one-dimensional Gaussian of the activations, whatever their scale, and is defined at B = 0. A subspace in which half
    of the pairs coincide has no bandwidth; its pairs count zero.

    No N x N kernel is built. A Gaussian is the product of two Gaussian bumps, summed over their centres on a grid,

    .. math:: \exp(-(a - b)^2 / 2) \propto \sum_t \exp(-(a - t)^2) \exp(-(b - t)^2),

    which converges faster than exponentially as the grid gets finer: 20 to 40 bumps a subspace of normal activations
    give seven digits. With these features a trace is the squared norm of a small matrix. Gaps between samples that are
    wider than the kernel reaches are closed first, so that a few far outliers do not stretch the grid. Where the
    samples still cover more than 128 bandwidths (more than half of all pairs nearly coincide, say), that subspace's
    bandwidth is doubled until they do not, so that memory stays linear in the samples whatever they are.

    The gradient reaches the activations (A, and the layers below), never the basis (B); it takes the bandwidth's
    dependence on the activations into account.

    Args:
        activations (Tensor): ``(..., N, r)``, any float dtype; leading dimensions are layers.
        basis (Tensor): taken for the common signature, it has no influence.
        sigma_fraction (float): bandwidth as a fraction of the median distance. Default: 1; the paper gives none.

    Returns:
        Tensor: ``(...)``, in float32 at least.

    Raises:
        ValueError: if sigma_fraction is not positive.
    """
    if not sigma_fraction > 0:
        raise ValueError(f"sigma_fraction is {sigma_fraction}; expected a positive fraction of the median distance")
    basis = activations.new_zeros(*activations.shape[:-2], 1, 1)  # without influence
    return with_gradients(partial(_nonlinear, sigma_fraction=sigma_fraction), activations, basis)


def _nonlinear(activations: Tensor, _: Tensor, sigma_fraction: float) -> ValueAndGradients:
    """Of several layers at once, (L, N, r). Inside, a row is a subspace: (L r, N)."""
    layers, count, rank = activations.shape
    values = activations.mT.to(torch.promote_types(activations.dtype, torch.float32))
    values = values.reshape(layers * rank, count).contiguous()
    if count < 2 or rank < 2:
        return values.new_zeros(layers), None, None
    ordered, order = values.sort(dim=1)
    middle = ordered[:, (count - 1) // 2, None].clone()
    values, ordered = values - middle, ordered.sub_(middle)
    largest = torch.maximum(ordered[:, -1:], -ordered[:, :1])
    largest = largest.where(largest > 0, torch.ones_like(largest))
    values, ordered = values.div_(largest), ordered.div_(largest)

    lower, upper = median_pair(ordered)
    median = ordered.gather(1, upper) - ordered.gather(1, lower)
    alive = median > 0
    median = median.where(alive, torch.ones_like(median))
    bandwidth = _wide_enough(ordered, sigma_fraction * median)
    scaled = values.div_(bandwidth).mul_(alive)
    near = _without_gaps(scaled, ordered.div_(bandwidth).mul_(alive), order)
    aligned = [
        _kernel_alignment(*layer)
        for layer in zip(near.view(layers, rank, count), alive.view(layers, rank), strict=True)
    ]  # fmt: skip
    value, to_scaled = torch.stack([v for v, _ in aligned]), torch.cat([g for _, g in aligned])

    # scaled = values / bandwidth, and the bandwidth a multiple of the distance between the samples of the median pair.
    to_values = to_scaled / bandwidth
    to_median = -(to_scaled * scaled).sum(dim=1, keepdim=True) / median
    to_values.scatter_add_(1, order.gather(1, upper), to_median)
    to_values.scatter_add_(1, order.gather(1, lower), -to_median)
    gradient = (to_values * alive).to(torch.float64 if activations.device.type != "mps" else values.dtype) / largest
    return value, kept(gradient, activations.dtype).view(layers, rank, count).mT, None


def _kernel_alignment(values: Tensor, alive: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of Eq. 8 for kernels of bandwidth 1 on the rows of (r, N), and its gradient; dead rows count zero."""
    rank, count = values.shape
    away = _from_centres(values)  # (r, bumps, N)
    bumps = away.shape[1]
    features = away.square().neg_().exp_()
    centred = (features - features.mean(dim=2, keepdim=True)).view(rank * bumps, count)
    products = centred @ centred.T
    blocks = products.view(rank, bumps, rank, bumps)
    traces = blocks.square().sum(dim=(1, 3))
    own = traces.diagonal()
    norms = own.where(alive, torch.ones_like(own)).sqrt()
    both = (alive[:, None] & alive).to(values.dtype).fill_diagonal_(0)
    ratios = traces / (norms[:, None] * norms) * both
    weights = 0.5 * both / (norms[:, None] * norms)  # of the traces; each pair is there twice
    weights.diagonal().copy_(-0.5 * ratios.sum(dim=1) / norms.square())
    to_features = (blocks * weights[:, None, :, None]).view_as(products) @ centred  # a quarter of it
    gradient = to_features.view_as(features).mul_(features).mul_(away).sum(dim=1).mul_(-8)
    return sum_of_pairs(ratios), gradient


def _wide_enough(ordered: Tensor, bandwidth: Tensor) -> Tensor:
    """The bandwidth (r, 1), doubled until the samples (r, N) of its row cover at most WIDEST of it, gaps closed."""
    while (ordered[:, -1:] - ordered[:, :1] > WIDEST * bandwidth).any():  # without looking at the gaps, mostly enough
        covered = (ordered.diff(dim=1) / bandwidth).clamp_(max=REACH).sum(dim=1, keepdim=True)
        if not (wide := covered > WIDEST).any():
            break
        bandwidth = torch.where(wide, 2 * bandwidth, bandwidth)
    return bandwidth


def _without_gaps(values: Tensor, ordered: Tensor, order: Tensor) -> Tensor:
    """(r, N) values moved together, so that no gap of their row is wider than the kernel reaches."""
    gaps = ordered.diff(dim=1)
    wide = (gaps > REACH).any(dim=1, keepdim=True)
    if not wide.any():
        return values
    exact = torch.float64 if values.device.type != "mps" else values.dtype
    # From the gaps themselves: what is 1e15 away has no digits left for its neighbours.
    places = torch.zeros_like(ordered, dtype=exact)
    places[:, 1:] = gaps.clamp_(max=REACH).to(exact).cumsum(dim=1)
    return torch.where(wide, torch.zeros_like(values).scatter_(1, order, places.to(values.dtype)), values)


def _from_centres(values: Tensor) -> Tensor:
    """The distance of each value from each of the bumps that cover its row: (r, N) -> (r, bumps, N)."""
    start = values.amin(dim=1) - MARGIN
    width = float((values.amax(dim=1) - start).max()) + MARGIN
    centres = start[:, None] + SPACING * torch.arange(int(width / SPACING) + 2, device=values.device)
    return values[:, None, :] - centres[:, :, None]

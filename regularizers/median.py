"""The median distance between two of N numbers, without the N (N - 1) / 2 distances."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def median_pair(ordered: Tensor) -> tuple[Tensor, Tensor]:
    """Two positions in each row whose distance is the row's median pairwise distance (the lower one, as torch's).

    Bisection on the distance: how many pairs are closer than d is a binary search for each number, N log N in all.

    Args:
        ordered: ``(r, N)``, each row ascending, N >= 2.

    Returns:
        lower, upper: ``(r, 1)`` positions; ``ordered[upper] - ordered[lower]`` is the median, to a relative error below
        1e-6 in float32 and 1e-12 in float64 where that many distances lie so close together, and exact otherwise.
    """
    count = ordered.shape[1]
    rank = (count * (count - 1) // 2 - 1) // 2 + 1  # pairs at most as far apart as the median
    tolerance = 1e-6 if ordered.dtype == torch.float32 else 1e-12
    below = -torch.arange(1, count + 1, device=ordered.device).sum()

    low = torch.zeros_like(ordered[:, :1])
    high = ordered[:, -1:] - ordered[:, :1]
    at_low = _within(ordered, low) + below
    at_high = torch.full_like(at_low, count * (count - 1) // 2)
    high, at_high = high.where(at_low < rank, low), at_high.where(at_low < rank, at_low)
    for step in range(64):
        if ((at_high == rank) | (high - low <= tolerance * high)).all():
            break
        share = (rank - 0.5 - at_low) / (at_high - at_low).clamp(min=1)
        # Interpolation between the counts, which is quick where they are smooth; every third time half, which is safe.
        share = share.to(ordered.dtype).clamp(0.02, 0.98) if step % 3 else torch.full_like(low, 0.5)
        middle = low + (high - low) * share
        closer = _within(ordered, middle) + below
        enough = closer >= rank
        high, at_high = middle.where(enough, high), closer.where(enough, at_high)
        low, at_low = low.where(enough, middle), at_low.where(enough, closer)
    # number + distance is rounded; without the slack the pair itself could be missed
    slack = 4 * torch.finfo(ordered.dtype).eps * ordered.abs().amax(dim=1, keepdim=True)
    upper = torch.searchsorted(ordered, ordered + (high + slack), right=True) - 1
    lower = (ordered.gather(1, upper) - ordered).argmax(dim=1, keepdim=True)
    return lower, upper.gather(1, lower)


def _within(ordered: Tensor, distance: Tensor) -> Tensor:
    """For each row, the sum over its numbers of how many numbers are not above number + distance: (r, 1)."""
    return torch.searchsorted(ordered, ordered + distance, right=True).sum(dim=1, keepdim=True)

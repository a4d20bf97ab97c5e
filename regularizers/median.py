"""The median distance between two of N numbers, without the N (N - 1) / 2 distances."""

from __future__ import annotations

import torch
from torch import Tensor

SAMPLE = 256


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
    pairs = count * (count - 1) // 2
    rank = (pairs - 1) // 2 + 1  # pairs at most as far apart as the median
    tolerance = 1e-6 if ordered.dtype == torch.float32 else 1e-12

    low = torch.zeros_like(ordered[:, :1])
    high = ordered[:, -1:] - ordered[:, :1]
    at_low, at_high = _pairs_within(ordered, low), torch.full_like(high, pairs, dtype=torch.long)
    high, at_high = high.where(at_low < rank, low), at_high.where(at_low < rank, at_low)
    guesses = _guesses(ordered)
    for step in range(64):
        if ((at_high == rank) | (high - low <= tolerance * high)).all():
            break
        if step < len(guesses):
            middle = guesses[step].clamp(low, high)
        else:
            share = (rank - 0.5 - at_low) / (at_high - at_low).clamp(min=1)
            # Interpolation between the counts, which is quick where they are smooth; every third time half, to be safe.
            share = share.to(ordered.dtype).clamp(0.02, 0.98) if step % 3 else torch.full_like(low, 0.5)
            middle = low + (high - low) * share
        within = _pairs_within(ordered, middle)
        enough = within >= rank
        high, at_high = middle.where(enough, high), within.where(enough, at_high)
        low, at_low = low.where(enough, middle), at_low.where(enough, within)
    # number + distance is rounded: search a little further, and keep what is not too far apart.
    eps = 4 * torch.finfo(ordered.dtype).eps
    upper = torch.searchsorted(ordered, ordered + high + eps * (ordered.abs() + high), right=True) - 1
    candidates = torch.stack([upper, (upper - 1).clamp(min=0)])
    distances = ordered.gather(1, candidates.movedim(0, 1).flatten(1)).view(len(ordered), 2, count) - ordered[:, None]
    distances = distances.where(distances <= high[:, None] * (1 + eps), -torch.ones_like(distances))
    best = distances.flatten(1).argmax(dim=1, keepdim=True)
    return best % count, candidates.movedim(0, 1).flatten(1).gather(1, best)


def _guesses(ordered: Tensor) -> list[Tensor]:
    """Two distances that most probably have the median between them, from an evenly spaced sample; none for few."""
    if ordered.shape[1] < 8 * SAMPLE:
        return []
    sample = ordered[:, :: ordered.shape[1] // SAMPLE].contiguous()
    lower, upper = median_pair(sample)
    middle = sample.gather(1, upper) - sample.gather(1, lower)
    return [0.99 * middle, 1.01 * middle]


def _pairs_within(ordered: Tensor, distance: Tensor) -> Tensor:
    """For each row, how many pairs of its numbers are at most `distance` apart: (r, 1)."""
    count = ordered.shape[1]
    up_to = torch.searchsorted(ordered, ordered + distance, right=True, out_int32=True).sum(dim=1, keepdim=True)
    return up_to - count * (count + 1) // 2  # not with itself, nor with those before it

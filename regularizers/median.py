"""The median distance between two of N numbers, without the N (N - 1) / 2 distances."""

from __future__ import annotations

import torch
from torch import Tensor

BINS = 1024  # of the histogram that the search begins with
FEW = 256  # pairs of a row that are listed, to end the search


@torch.no_grad()
def median_pair(ordered: Tensor) -> tuple[Tensor, Tensor]:
    """Two positions in each row whose distance is the row's median pairwise distance (the lower one, as torch's).

    How many pairs are closer than d is a binary search for each number, N log N in all. A histogram gives the first
    d; interpolation between the counts closes in on the median, and the last few pairs are listed and sorted. That
    takes 4 to 7 counts where the distances are spread smoothly, and up to 64 where they are not.

    Args:
        ordered: ``(r, N)``, each row ascending, N >= 2.

    Returns:
        lower, upper: ``(r, 1)`` positions; ``ordered[upper] - ordered[lower]`` is the median, to a relative error below
        1e-6 in float32 and 1e-12 in float64 where that many distances lie so close together, and exact otherwise.
    """
    count = ordered.shape[1]
    pairs = count * (count - 1) // 2
    rank = (pairs + 1) // 2  # pairs at most as far apart as the median
    tolerance = 1e-6 if ordered.dtype == torch.float32 else 1e-12

    # The search keeps at_low < rank <= at_high, the numbers of pairs at most `low` and at most `high` apart: the median
    # is in (low, high]. Each number's part of them, with those before it, is in `below` and `up_to`.
    low = torch.zeros_like(ordered[:, :1])
    high = ordered[:, -1:] - ordered[:, :1]
    up_to = torch.full_like(ordered, count, dtype=torch.int32)
    distinct = torch.arange(1, count + 1, dtype=torch.int32, device=ordered.device).expand_as(ordered)
    below = _within(ordered, low) if (ordered.diff(dim=1) == 0).any() else distinct
    at_low, at_high = _pairs(below), _pairs(up_to)
    coincide = at_low >= rank  # then the median is zero, and so are both ends from here on
    high, up_to, at_high = high.where(~coincide, low), up_to.where(~coincide, below), at_high.where(~coincide, at_low)
    first, second = _around_median(ordered, rank) if pairs > FEW else (low, high)
    for step in range(64):
        if ((at_high - at_low <= FEW) | (high - low <= tolerance * high)).all():
            break
        if step < 2:
            middle = (first, second)[step].clamp(low, high)
        else:
            # Move the end that is further off in pairs to just beyond the median; every fourth time half, to be safe.
            aim = torch.where(rank - at_low > at_high - rank, rank - FEW // 4, rank + FEW // 4)
            share = ((aim - at_low) / (at_high - at_low).clamp(min=1)).to(ordered.dtype).clamp(0.02, 0.98)
            middle = low + (high - low) * (share if step % 4 else 0.5)
        within = _within(ordered, middle)
        at = _pairs(within)
        enough = at >= rank
        high, up_to, at_high = middle.where(enough, high), within.where(enough, up_to), at.where(enough, at_high)
        low, below, at_low = low.where(enough, middle), below.where(enough, within), at_low.where(enough, at)
    return _select(ordered, below, up_to, rank - at_low)


def _around_median(ordered: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Two distances that most probably have the median between them: (r, 1) each, one bin of a histogram apart.

    The histogram's correlation with itself counts the pairs that lie so many bins apart. What is far from where most
    numbers are goes into the outermost bins: its distance to them exceeds the median in any case.
    """
    count = ordered.shape[1]
    inner, outer = ordered[:, count // 16, None], ordered[:, count - 1 - count // 16, None]
    start = torch.maximum(ordered[:, :1], 2 * inner - outer)
    width = (torch.minimum(ordered[:, -1:], 2 * outer - inner) - start) / BINS
    width = width.where(width > 0, torch.ones_like(width))
    bins = ((ordered - start) / width).clamp_(0, BINS - 1).long()
    histogram = torch.zeros_like(ordered[:, :1]).expand(-1, BINS).scatter_add(1, bins, torch.ones_like(ordered))
    spectrum = torch.fft.rfft(histogram, 2 * BINS)
    apart = torch.fft.irfft(spectrum.abs().square(), 2 * BINS)[:, :BINS]  # pairs so many bins apart
    apart[:, 0] -= count  # and the same bin holds each pair twice
    closer = (0.5 * (apart[:, :-1] + apart[:, 1:])).cumsum(dim=1)  # than 1, 2, ... bins; linear within a bin
    at = torch.searchsorted(closer, torch.full_like(width, rank)).clamp(1, BINS - 2)
    below, above = closer.gather(1, at - 1), closer.gather(1, at)
    distance = width * (at + ((rank - below) / (above - below).clamp(min=1)).clamp(0, 1))
    return distance - 0.5 * width, distance + 0.5 * width


def _within(ordered: Tensor, distance: Tensor) -> Tensor:
    """For each number, how many of its row are at most `distance` above it, with those before it: (r, N)."""
    return torch.searchsorted(ordered, ordered + distance, right=True, out_int32=True)


def _pairs(within: Tensor) -> Tensor:
    """How many pairs that are: (r, N) -> (r, 1)."""
    count = within.shape[1]
    return within.sum(dim=1, keepdim=True) - count * (count + 1) // 2  # not with itself, nor with those before it


def _select(ordered: Tensor, below: Tensor, up_to: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Of the pairs within the upper but not the lower distance, the wanted-th closest of each row; (0, 0) for none."""
    rows, count = ordered.shape
    each = up_to - below
    each = each.where(each.sum(dim=1, keepdim=True) <= FEW, each.clamp(max=1))  # many alike: any of them will do
    first = torch.repeat_interleave(torch.arange(rows * count, device=ordered.device), each.flatten())
    listed = each.sum(dim=1, keepdim=True)
    if not len(first):
        return torch.zeros_like(listed), torch.zeros_like(listed)
    offset = torch.arange(len(first), device=ordered.device) - (each.flatten().cumsum(0) - each.flatten())[first]
    row, lower, upper = first // count, first % count, below.flatten()[first] + offset
    by_distance = (ordered[row, upper] - ordered[row, lower]).argsort()
    in_order = by_distance[row[by_distance].argsort(stable=True)]
    place = listed.cumsum(0) - listed + torch.minimum(wanted, listed).clamp(min=1) - 1
    chosen = in_order[place.clamp(max=len(first) - 1)]
    found = listed > 0
    return lower[chosen] * found, upper[chosen] * found

"""The stand-ins for torchvision's compiled operators, against loops over boxes, cells and samples."""

from __future__ import annotations

from math import ceil

import numpy as np
import pytest
import torch

from adapters.torchvision_cpu import nms, roi_align, use_cpu_kernels


def boxes(count: int, side: float, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    corner, size = random.uniform(-2, side, (count, 2)), random.uniform(0, side / 2, (count, 2))
    return np.concatenate([corner, corner + size], axis=1).astype(np.float32)


def nms_by_loop(found: np.ndarray, scores: np.ndarray, threshold: float) -> list[int]:
    kept: list[int] = []
    for candidate in sorted(range(len(found)), key=lambda i: (-scores[i], i)):
        x1, y1, x2, y2 = found[candidate].astype(float)
        for other in kept:
            a1, b1, a2, b2 = found[other].astype(float)
            common = max(0.0, min(x2, a2) - max(x1, a1)) * max(0.0, min(y2, b2) - max(y1, b1))
            union = (x2 - x1) * (y2 - y1) + (a2 - a1) * (b2 - b1) - common
            if union > 0 and common / union > threshold:
                break
        else:
            kept.append(candidate)
    return kept


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.7])
def test_nms_is_the_loop(threshold: float) -> None:
    found = boxes(200, 20.0, seed=0)
    found[7], found[8, 2:] = found[3], found[8, :2]  # a box twice, and one without area
    scores = np.random.default_rng(1).choice(np.linspace(0, 1, 40), 200).astype(np.float32)  # with ties
    kept = nms(torch.from_numpy(found), torch.from_numpy(scores), threshold)
    assert kept.tolist() == nms_by_loop(found, scores, threshold)
    assert nms(torch.zeros(0, 4), torch.zeros(0), threshold).shape == (0,)


def sampled(picture: np.ndarray, y: float, x: float) -> np.ndarray:
    """(C, H, W) at a point between pixels: (C,)."""
    _, height, width = picture.shape
    if not (-1 <= y <= height and -1 <= x <= width):
        return np.zeros(len(picture))
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    total = np.zeros(len(picture))
    for row in {int(y), min(int(y) + 1, height - 1)}:
        for column in {int(x), min(int(x) + 1, width - 1)}:
            total += picture[:, row, column] * max(0, 1 - abs(y - row)) * max(0, 1 - abs(x - column))
    return total


def roi_align_by_loop(
    maps: np.ndarray, rois: np.ndarray, scale: float, size: tuple[int, int], ratio: int, aligned: bool
) -> np.ndarray:
    out = np.zeros((len(rois), maps.shape[1], *size))
    for k, (item, *corners) in enumerate(rois.astype(float)):
        x1, y1, x2, y2 = (corner * scale - (0.5 if aligned else 0) for corner in corners)
        height, width = (y2 - y1, x2 - x1) if aligned else (max(y2 - y1, 1), max(x2 - x1, 1))
        rows, columns = (ratio, ratio) if ratio > 0 else (ceil(height / size[0]), ceil(width / size[1]))
        for i in range(size[0]):
            for j in range(size[1]):
                points = [
                    (y1 + height / size[0] * (i + (a + 0.5) / rows), x1 + width / size[1] * (j + (b + 0.5) / columns))
                    for a in range(rows)
                    for b in range(columns)
                ]
                out[k, :, i, j] = sum(sampled(maps[int(item)], y, x) for y, x in points) / max(len(points), 1)
    return out


@pytest.mark.parametrize("ratio", [2, 0])
@pytest.mark.parametrize("aligned", [False, True])
def test_roi_align_is_the_loop(ratio: int, aligned: bool) -> None:
    random = np.random.default_rng(0)
    maps = random.standard_normal((2, 3, 9, 13)).astype(np.float32)
    rois = np.concatenate([random.integers(0, 2, (25, 1)), boxes(25, 40.0, seed=2)], axis=1).astype(np.float32)
    rois[3, 1:] = [300, 300, 340, 340]  # off the map
    rois[4, 3:] = rois[4, 1:3]  # empty
    found = roi_align(torch.from_numpy(maps), torch.from_numpy(rois), 0.25, 4, 3, ratio, aligned)
    expected = roi_align_by_loop(maps, rois, 0.25, (4, 3), ratio, aligned)
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-6)
    assert np.abs(expected).max() > 0.5
    empty = roi_align(torch.from_numpy(maps), torch.zeros(0, 5), 0.25, 4, 3, ratio, aligned)
    assert empty.shape == (0, 3, 4, 3)


def test_torchvision_calls_them() -> None:
    """Whichever there are, compiled or ours: torchvision's own functions give the loops' values."""
    from torchvision import ops

    use_cpu_kernels()
    found, scores = boxes(60, 20.0, seed=3), np.random.default_rng(4).random(60).astype(np.float32)
    kept = ops.nms(torch.from_numpy(found), torch.from_numpy(scores), 0.4)
    assert kept.tolist() == nms_by_loop(found, scores, 0.4)
    maps = torch.randn(1, 2, 8, 8, requires_grad=True)
    rois = np.concatenate([np.zeros((60, 1)), found], axis=1).astype(np.float32)
    pooled = ops.roi_align(maps, torch.from_numpy(rois), (2, 2), 0.5, 2)
    expected = roi_align_by_loop(maps.detach().numpy(), rois, 0.5, (2, 2), 2, False)
    np.testing.assert_allclose(pooled.detach().numpy(), expected, atol=2e-6)
    pooled.sum().backward()
    assert maps.grad is not None and maps.grad.abs().sum() > 0

"""GPO against a loop over items, channels and positions."""

from __future__ import annotations

import math

import pytest
import torch

from retrieval.gpo import GPO, sinusoids


def pooled_by_loop(gpo: GPO, features: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """One item and one channel at a time, without padding anywhere."""
    rows = []
    for item, length in zip(features, lengths.tolist(), strict=True):
        position = torch.zeros(length, gpo.d_position)
        for p in range(length):
            for j in range(gpo.d_position // 2):
                frequency = 10000.0 ** (-2 * j / gpo.d_position)
                position[p, 2 * j], position[p, 2 * j + 1] = math.sin(p * frequency), math.cos(p * frequency)
        hidden = gpo.gru(position[None])[0][0]  # (length, 64)
        half = hidden.shape[1] // 2
        weights = torch.softmax(gpo.score((hidden[:, :half] + hidden[:, half:]) / 2)[:, 0] / 0.1, dim=0)
        channels = [sorted(item[:length, c].tolist(), reverse=True) for c in range(item.shape[1])]
        rows.append(torch.tensor([sum(w * v for w, v in zip(weights.tolist(), c, strict=True)) for c in channels]))
    return torch.stack(rows)


def test_equals_the_loop() -> None:
    torch.manual_seed(0)
    gpo, lengths = GPO(), torch.tensor([5, 1, 3, 5])
    features = torch.randn(4, 6, 7)  # padded beyond the longest item
    expected = pooled_by_loop(gpo, features, lengths)
    torch.testing.assert_close(gpo(features, lengths), expected, atol=1e-5, rtol=1e-5)
    features[0, 5], features[1, 1:] = float("inf"), 1e9  # what stands in the padding does not matter
    torch.testing.assert_close(gpo(features, lengths), expected, atol=1e-5, rtol=1e-5)


def test_padding_gets_no_gradient_and_parameters_do() -> None:
    gpo, features = GPO(), torch.randn(2, 4, 3, requires_grad=True)
    gpo(features, torch.tensor([4, 2])).square().sum().backward()
    assert features.grad is not None
    assert not features.grad[1, 2:].any() and features.grad[1, :2].any()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in gpo.parameters() if p.requires_grad)


def test_published_size() -> None:
    assert sum(p.numel() for p in GPO().parameters()) == 12_704


def test_bfloat16_stays_finite() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pooled = GPO()(torch.randn(2, 4, 3, dtype=torch.bfloat16), torch.tensor([4, 1]))
    assert torch.isfinite(pooled).all()


def test_empty_and_overlong_sets_are_refused() -> None:
    for lengths in ([0, 2], [2, 5]):
        with pytest.raises(ValueError, match="expected 1 to 4"):
            GPO()(torch.randn(2, 4, 3), torch.tensor(lengths))
    assert sinusoids(3, 4).shape == (3, 4)

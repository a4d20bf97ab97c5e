"""Means over folds against NumPy's argmax, fold by fold."""

from __future__ import annotations

import numpy as np
import pytest

from eval.folds import fold_metrics


def test_a_fold_is_neighbouring_images_with_their_own_captions() -> None:
    rng = np.random.default_rng(0)
    owners = rng.permutation(np.repeat(np.arange(60), rng.integers(1, 4, size=60)))
    images = rng.normal(size=(60, 8))
    texts = images[owners] + 1.5 * rng.normal(size=(len(owners), 8))
    unit = images / np.linalg.norm(images, axis=1, keepdims=True)
    hits = {"t2i": [], "i2t": []}
    for first in range(0, 60, 20):
        own = np.flatnonzero(owners // 20 == first // 20)
        scores = unit[first : first + 20] @ (texts[own] / np.linalg.norm(texts[own], axis=1, keepdims=True)).T
        hits["t2i"].append(np.mean(scores.argmax(axis=0) + first == owners[own]))
        hits["i2t"].append(np.mean(owners[own][scores.argmax(axis=1)] == np.arange(first, first + 20)))
    metrics, chance = fold_metrics(images, texts, owners, 3)
    for direction, shares in hits.items():
        assert metrics[f"{direction}_R@1"] == pytest.approx(100 * np.mean(shares)) and 10 < 100 * np.mean(shares) < 90
    assert metrics["rsum"] == pytest.approx(sum(value for key, value in metrics.items() if "R@" in key))
    assert chance["t2i_R@1"] == pytest.approx(5) and chance["t2i_MeanR"] == pytest.approx(21 / 2)


@pytest.mark.parametrize("folds", [0, -2, 3, 5])
def test_folds_of_another_size_are_refused(folds: int) -> None:
    with pytest.raises(ValueError, match=f"4 images do not make {folds} folds of one size"):
        fold_metrics(np.eye(4), np.eye(4), np.arange(4), folds)

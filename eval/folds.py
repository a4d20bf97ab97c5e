"""Metrics as means over folds of a split: COCO's "1K" numbers are those of five folds of its 5,000 test images."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from eval.chance import chance_level
from eval.inputs import caption_owners
from eval.metrics import retrieval_metrics


def fold_metrics(
    images: ArrayLike, texts: ArrayLike, image_of_text: ArrayLike, folds: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Means of `retrieval_metrics` over folds of neighbouring images with their captions, and of their chance.

    A fold of 1,000 images is an easier gallery than 5,000 are: its numbers are a good deal higher, and to be compared
    with those of as many images only. Karpathy's order of COCO's images gives the folds of prior work.

    Args:
        images, texts, image_of_text: as in `retrieval_metrics`.
        folds: how many, all of one size.

    Returns:
        The keys of `retrieval_metrics`, each twice: the mean over the folds, and the mean of `chance_level`.

    Raises:
        ValueError: as `retrieval_metrics`; if the images do not make so many folds of one size.
    """
    vision, text = _rows(images), _rows(texts)
    count = len(vision)
    if folds < 1 or count % folds:
        raise ValueError(f"{count} images do not make {folds} folds of one size; expected a divisor of {count}")
    owners, size = caption_owners(image_of_text, count), count // folds
    metrics, chance = [], []
    for first in range(0, count, size):
        captions = np.flatnonzero((owners >= first) & (owners < first + size))
        own = owners[captions] - first
        metrics.append(retrieval_metrics(vision[first : first + size], text[captions], own))
        chance.append(chance_level(own, size))
    return _means(metrics), _means(chance)


def _rows(values: Any) -> Any:
    """A torch tensor as it is, anything else as an array, without a copy: both have rows to choose from."""
    return values if hasattr(values, "detach") else np.asarray(values)


def _means(several: list[dict[str, float]]) -> dict[str, float]:
    return {key: sum(each[key] for each in several) / len(several) for key in several[0]}

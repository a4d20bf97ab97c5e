"""What a data set is, for those who train and evaluate: labelled images, and which of them are for what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from torch import Tensor

SPLITS = ("train", "validation", "test")


class ClassificationDataset(Protocol):
    """All images of a data set. Splits are indices, so that what is computed once per image serves every split.

    Attributes:
        name: the data set's key in `DATASETS`.
        classes: C names.
        labels: ``(n,)`` int64 in 0..C-1.
        splits: each of `SPLITS` -> the indices of its images, ascending; no index is in two, and a split may be
            empty. Where prior work validates on test (VTAB-1K), its images are there a second time.
        preprocessing: how files became what `images` returns; part of what a result depends on.
        augmentation: "none", or what `augmented` does at random.
    """

    name: str
    classes: Sequence[str]
    labels: np.ndarray
    splits: Mapping[str, np.ndarray]
    preprocessing: str
    augmentation: str

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the source's pixels (or a sample of its files), the labels and the preprocessing.

        Not over the splits, nor over the augmentation: what is computed from `images` depends on neither.
        """
        ...

    def images(self, indices: Sequence[int] | np.ndarray) -> Tensor:
        """``(B, 3, H, W)`` float32, normalised for the backbone, without augmentation."""
        ...

    def augmented(self, index: int, seed: int) -> Tensor:
        """``(3, H, W)`` float32, normalised: what a training sees of an image, the same for the same index and seed.

        Random number generators are left as they were found. Without an augmentation it is ``images([index])[0]``.
        """
        ...

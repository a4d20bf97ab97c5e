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
        splits: each of `SPLITS` -> the indices of its images, ascending; no image is in two.
        preprocessing: how files became what `images` returns; part of what a result depends on.
    """

    name: str
    classes: Sequence[str]
    labels: np.ndarray
    splits: Mapping[str, np.ndarray]
    preprocessing: str

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the source's pixels, the labels and the preprocessing; not over the splits."""
        ...

    def images(self, indices: Sequence[int] | np.ndarray) -> Tensor:
        """``(B, 3, H, W)`` float32, normalised for the backbone."""
        ...

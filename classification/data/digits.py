"""Handwritten digits: 1,797 real images of the writing of 13 people (Alpaydin and Kaynak, 1998), with scikit-learn.

The test set of UCI's "Optical Recognition of Handwritten Digits" as 8 x 8 counts of ink, 0 to 16, in ten classes of
174 to 183 images. It comes inside the package: nothing is downloaded. The source does not say who wrote what, so
writers occur in all splits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

SIZES = {"train": 997, "validation": 300, "test": 500}
SPLIT_SEED = 0  # the splits are part of the data, not of a run


class Digits:
    """The digits as RGB images; a `ClassificationDataset`.

    Args:
        size: side in pixels after bicubic upsampling. Default: 56, four of DINOv2's patches.
        train_images: size of the training split, chosen at random and balanced over the classes (counts differ by one
            at most); None keeps all 997, as they come. Validation and test stay the same.
        subset_seed: of that choice.

    Raises:
        ValueError: ``size`` or ``train_images`` is out of range.
        ModuleNotFoundError: scikit-learn is not installed.
    """

    name = "digits"
    classes = tuple("0123456789")
    augmentation = "none"

    def __init__(self, *, size: int = 56, train_images: int | None = None, subset_seed: int = 0) -> None:
        if size < 8:
            raise ValueError(f"data.size is {size}; expected at least 8 pixels, the size of the source")
        try:
            from sklearn.datasets import load_digits
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("the digits come with scikit-learn; pip install -e '.[demo]'") from error
        source = load_digits()
        self.size = size
        self.pixels: np.ndarray = source.images.astype(np.uint8)  # (1797, 8, 8), 0..16
        self.labels: np.ndarray = source.target.astype(np.int64)
        self.splits = stratified_splits(self.labels)
        if train_images is not None:
            train = self.splits["train"]
            self.splits["train"] = train[balanced_subset(self.labels[train], train_images, subset_seed)]
        self.preprocessing = f"ink / 16, bicubic to {size} px, clipped to 0..1, grey as RGB, ImageNet mean and std"

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over pixels, labels and preprocessing."""
        digest = hashlib.sha256(self.preprocessing.encode())
        for array in (self.pixels, self.labels.astype("<i8")):
            digest.update(f"{array.shape}".encode() + array.tobytes())
        return digest.hexdigest()

    def images(self, indices: Sequence[int] | np.ndarray) -> Tensor:
        """``(B, 3, size, size)`` float32, bright ink on black, normalised as ImageNet."""
        from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

        ink = torch.from_numpy(self.pixels[np.asarray(indices)]).float()[:, None] / 16  # (B, 1, 8, 8)
        # antialias changes nothing when upsampling but the kernel: a = -0.5, that of Pillow and of Keys (1981)
        grey = functional.interpolate(ink, size=(self.size, self.size), mode="bicubic", antialias=True).clamp(0, 1)
        mean, deviation = (
            torch.tensor(values)[:, None, None] for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
        )
        return (grey - mean) / deviation

    def augmented(self, index: int, seed: int) -> Tensor:
        """``(3, size, size)``: the image as it is, whatever the seed."""
        return self.images([index])[0]


def stratified_splits(labels: np.ndarray) -> dict[str, np.ndarray]:
    """Indices of each split, ascending; every class has its share of each, up to rounding."""
    from sklearn.model_selection import train_test_split

    rest, test = train_test_split(
        np.arange(len(labels)), test_size=SIZES["test"], stratify=labels, random_state=SPLIT_SEED
    )
    train, validation = train_test_split(
        rest, test_size=SIZES["validation"], stratify=labels[rest], random_state=SPLIT_SEED
    )
    return {"train": np.sort(train), "validation": np.sort(validation), "test": np.sort(test)}


def balanced_subset(labels: np.ndarray, size: int, seed: int) -> np.ndarray:
    """Indices, ascending, of `size` random images with equal counts of each class; a rest goes to random classes.

    Raises:
        ValueError: if `size` is smaller than the number of classes, or larger than the smallest class allows.
    """
    classes, counts = np.unique(labels, return_counts=True)
    largest = len(classes) * int(counts.min())
    if not len(classes) <= size <= largest:
        raise ValueError(
            f"train_images is {size}; expected {len(classes)} to {largest} for a balanced subset, or null for all "
            f"{len(labels)}"
        )
    generator = np.random.default_rng(seed)
    each, rest = divmod(size, len(classes))
    one_more = set(generator.permutation(classes)[:rest].tolist())
    chosen = [
        generator.permutation(np.flatnonzero(labels == label))[: each + (label in one_more)]
        for label in classes.tolist()
    ]
    return np.sort(np.concatenate(chosen))

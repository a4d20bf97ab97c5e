"""The digits are scikit-learn's, the splits are fair, and the pixels are those that Pillow would make."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import StratifiedShuffleSplit

from classification.data import DATASETS, SPLITS, Digits


@pytest.fixture(scope="module")
def digits() -> Digits:
    return Digits()


def test_splits_cover_the_source_once(digits: Digits) -> None:
    assert DATASETS["digits"] is Digits and tuple(digits.splits) == SPLITS
    assert {name: len(indices) for name, indices in digits.splits.items()} == {
        "train": 997, "validation": 300, "test": 500
    }  # fmt: skip
    assert all(not np.intersect1d(a, b).size for a, b in combinations(digits.splits.values(), 2))
    assert np.array_equal(np.sort(np.concatenate(list(digits.splits.values()))), np.arange(1797))
    assert np.array_equal(digits.labels, load_digits().target) and digits.labels.dtype == np.int64


def test_splits_are_stratified(digits: Digits) -> None:
    """Every class has its share of each split up to rounding; the test split is scikit-learn's own stratified one."""
    labels = load_digits().target
    share = np.bincount(labels) / len(labels)
    for name, indices in digits.splits.items():
        assert np.abs(np.bincount(labels[indices]) - len(indices) * share).max() <= 1.5, name
    ((_, test),) = StratifiedShuffleSplit(1, test_size=500, random_state=0).split(labels, labels)
    assert np.array_equal(np.sort(test), digits.splits["test"])


@pytest.mark.parametrize("count", [10, 96, 400])
def test_a_subset_is_balanced_and_of_the_training_split(digits: Digits, count: int) -> None:
    subset = Digits(train_images=count, subset_seed=1)
    per_class = np.bincount(subset.labels[subset.splits["train"]], minlength=10)
    assert per_class.sum() == count and np.ptp(per_class) == (count % 10 > 0)
    assert np.isin(subset.splits["train"], digits.splits["train"]).all()
    assert len(np.unique(subset.splits["train"])) == count
    for name in ("validation", "test"):
        assert np.array_equal(subset.splits[name], digits.splits[name])
    again, other = (Digits(train_images=count, subset_seed=seed).splits["train"] for seed in (1, 2))
    assert np.array_equal(again, subset.splits["train"]) and not np.array_equal(other, subset.splits["train"])


def test_images_are_those_of_pillow(digits: Digits) -> None:
    """Oracle: Pillow's bicubic resize of the 8 x 8 floats, normalised with ImageNet's published numbers."""
    indices = [0, 5, 1796]
    images = digits.images(indices).numpy()
    assert images.shape == (3, 3, 56, 56) and images.dtype == np.float32
    for image, index in zip(images, indices, strict=True):
        ink = Image.fromarray((load_digits().images[index] / 16).astype(np.float32), mode="F")
        grey = np.asarray(ink.resize((56, 56), Image.Resampling.BICUBIC)).clip(0, 1)
        mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
        assert np.abs(image - (grey[None] - mean[:, None, None]) / deviation[:, None, None]).max() < 1e-4


def test_fingerprint_tells_the_size_but_not_the_subset(digits: Digits) -> None:
    assert Digits(train_images=50).fingerprint == digits.fingerprint != Digits(size=28).fingerprint


@pytest.mark.parametrize("settings", [{"size": 4}, {"train_images": 9}, {"train_images": 990}])
def test_what_cannot_be_is_refused(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"data\.size is 4|train_images is 9\d*; expected 10 to 9\d0 for a balanced"):
        Digits(**settings)

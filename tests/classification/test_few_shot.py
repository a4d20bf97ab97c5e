"""The few-shot lists are read as published, and what is random in a training repeats and leaves no trace."""

from __future__ import annotations

import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import RandAugment
from torchvision import transforms
from vtab_folder import write_few_shot

from classification.data import DATASETS, SPLITS, Digits, FewShot
from classification.data.augmentation import rand_augment, seeded
from classification.data.few_shot import FEW_SHOT, few_shot_folder
from classification.data.pixels import Preprocessing

TINY = {"dataset": "oxford-pets", "size": 20, "check_counts": False}
PUBLISHED = {  # classes, validation and test images: counted in NOAH's lists
    "fgvc-aircraft": (100, 3333, 3333), "food101": (101, 20200, 30300), "oxford-flowers102": (102, 1633, 2463),
    "oxford-pets": (37, 736, 3669), "standford-cars": (196, 1635, 8041),
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data")
    write_few_shot(path)
    return path


def test_the_published_counts(tmp_path: Path) -> None:
    assert FEW_SHOT == PUBLISHED
    lines = {name: few_shot_folder(tmp_path, name).lines for name in FEW_SHOT}
    for name, (classes, validation, test) in PUBLISHED.items():
        assert lines[name]["validation"] == validation and lines[name]["test"] == test and len(lines[name]) == 17
        for shots in (1, 2, 4, 8, 16):
            expected = 74 if (name, shots) == ("oxford-pets", 1) else shots * classes
            assert {lines[name][f"{shots}-shot, seed {seed}"] for seed in range(3)} == {expected}


@pytest.mark.parametrize("shots", [1, 2, 4, 8, 16])
def test_the_splits(root: Path, shots: int) -> None:
    assert DATASETS["few_shot"] is FewShot
    subsets = []
    for seed in range(3):
        data = FewShot(root=root, shots=shots, subset_seed=seed, **TINY)
        assert [len(data.splits[split]) for split in SPLITS] == [3 * shots, 6, 6]
        assert np.array_equal(np.concatenate(list(data.splits.values())), np.arange(len(data.labels)))
        train = data.splits["train"]
        assert np.bincount(data.labels[train]).tolist() == [shots] * 3 and data.classes == ("0", "1", "2")
        subsets.append({data.files[index] for index in train})
        assert all(file.startswith("class ") for file in subsets[-1]), "the label follows the last space"
    assert len(set.union(*subsets)) == 9 * shots


@pytest.mark.parametrize(
    ("dataset", "as_dtl"), [("standford-cars", False), ("standford-cars", True), ("food101", True)]
)
def test_other_layouts(tmp_path: Path, root: Path, dataset: str, as_dtl: bool) -> None:
    write_few_shot(tmp_path, dataset, as_dtl=as_dtl)
    data, noah = FewShot(root=tmp_path, **TINY | {"dataset": dataset}), FewShot(root=root, **TINY)
    assert data.fingerprint == noah.fingerprint and torch.equal(data.images([0, 50]), noah.images([0, 50]))


def test_repeated_lines_of_the_published_lists(tmp_path: Path) -> None:
    """As in oxford-pets: 74 lines are published, 37 images train."""
    write_few_shot(tmp_path, classes=37, held_out=37, repeat_one_shot=True, side=8, kinds=1)
    with pytest.warns(UserWarning, match="37 of 74 lines repeat an earlier one; each of the 37 images counts once"):
        data = FewShot(root=tmp_path, shots=1, **TINY)
    assert np.array_equal(data.splits["train"], np.arange(37)) and len(set(data.files)) == len(data.files)
    with pytest.raises(ValueError, match=r"val_meta\.list has 37 lines, published are 736") as counts:
        FewShot(root=tmp_path, dataset="oxford-pets", shots=1)
    assert "num_shot_1" not in str(counts.value)
    result = FewShot.verify(tmp_path, datasets=["oxford-pets"])
    assert len(result.notes) == 3 and "222 / 222" in result.text() and len(result.problems) == 2, result.text()


def test_images_are_those_of_torchvision(root: Path) -> None:
    data = FewShot(root=root, shots=1, augmentation="randaugment", **TINY)
    oracle = transforms.Compose(
        [
            transforms.Resize((20, 20), interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.ToTensor(),
            transforms.Normalize((0.5,) * 3, (0.5,) * 3),
        ]
    )
    expected = oracle(Image.open(root / "few-shot" / "oxford-pets" / "images" / "class 1" / "0_0.jpg"))
    torch.testing.assert_close(data.images([1])[0], expected, rtol=0, atol=1e-6)


def test_an_augmented_image_depends_on_index_and_seed_alone(root: Path) -> None:
    data, plain = (FewShot(root=root, augmentation=name, **TINY) for name in ("randaugment", "none"))
    assert data.fingerprint == plain.fingerprint and "rand-m9-mstd0.5-inc1" in data.augmentation
    first = [data.augmented(index, seed) for index in (0, 3) for seed in (0, 1)]
    assert all(image.shape == (3, 20, 20) and image.dtype == torch.float32 for image in first)
    assert len({image.numpy().tobytes() for image in first}) == 4
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    _ = data.augmented(3, 1)
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    assert states[:2] == after[:2] and torch.equal(states[2], after[2]), "generators are left as they were"
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    again = pickle.loads(pickle.dumps(data))
    assert all(
        torch.equal(again.augmented(index, seed), first[2 * (index > 0) + seed]) for index in (3, 0) for seed in (1, 0)
    )
    with pytest.raises(ValueError, match="seed -1: expected both to be at least 0"):
        data.augmented(0, -1)
    assert torch.equal(plain.augmented(3, 1), plain.images([3])[0])


def test_the_augmentation_is_that_of_timm(root: Path) -> None:
    """Oracle: timm's transform as DTL configures it, from the same state of the generators."""
    data = FewShot(root=root, augmentation="randaugment", **TINY)
    half = (0.5, 0.5, 0.5)
    theirs = create_transform(
        20, is_training=True, auto_augment="rand-m9-mstd0.5-inc1", interpolation="bicubic", mean=half, std=half
    )
    image = Image.open(data.folder.images / data.files[4]).convert("RGB")
    for seed in range(40):
        with seeded(4, seed):
            expected = theirs(image)
        assert torch.equal(data.augmented(4, seed), expected)


@pytest.mark.parametrize("magnitude", [0, 9, 10])
def test_every_operation_works_at_its_ends(magnitude: float) -> None:
    """Pillow 13 refuses the 0 bits that timm's posterize asks for at magnitude 10; they are black, as ever."""
    steps = rand_augment(Preprocessing(size=20, normalization="half")).transforms
    (random_operations,) = (step for step in steps if isinstance(step, RandAugment))
    image = Image.fromarray(np.arange(20 * 20 * 3, dtype=np.uint8).reshape(20, 20, 3))
    for operation in random_operations.ops:
        operation.prob, operation.magnitude, operation.magnitude_std = 1.0, magnitude, 0.0
        changed = np.asarray(operation(image))
        assert changed.shape == (20, 20, 3)
        if operation.name == "PosterizeIncreasing":
            bits = 4 - int(magnitude / 10 * 4)
            assert np.array_equal(changed, np.asarray(image) >> (8 - bits) << (8 - bits))


def test_digits_are_not_augmented() -> None:
    digits = Digits(size=16)
    assert digits.augmentation == "none" and torch.equal(digits.augmented(7, 3), digits.images([7])[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset": "stanford-cars"}, "unknown data.dataset 'stanford-cars'; did you mean 'standford-cars'?"),
        ({"shots": 3}, "data.shots is 3; choose from 1, 2, 4, 8, 16"),
        ({"subset_seed": 3}, "data.subset_seed is 3; choose from 0, 1, 2"),
        ({"augmentation": "autoaugment"}, "data.augmentation is 'autoaugment'; choose from none, randaugment"),
    ],
)
def test_what_cannot_be_is_refused(root: Path, settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FewShot(root=root, **TINY | settings)


def test_what_is_missing_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no .*num_shot_4\.seed_2 and no .*val_meta\.list") as missing:
        FewShot(root=tmp_path, dataset="food101", shots=4, subset_seed=2)
    for part in ("github.com/ZhangYuanhan-AI/NOAH", "github.com/KaiyangZhou/CoOp", "seed_{0,1,2}", "few-shot_split"):
        assert part in str(missing.value)

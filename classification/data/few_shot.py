"""Few-shot classification of fine-grained images: five data sets in the list files of NOAH, which DTL reads too.

For each data set and number of images a class (1, 2, 4, 8, 16) there are three training lists (seeds 0, 1, 2), and one
list each for validation and test. Labels are from 0 on, in an order of their own (flowers).

Source of lists, counts and layout: github.com/ZhangYuanhan-AI/NOAH, data/few-shot.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from classification.data.folder import ListedFolder
from classification.data.listed import ListedImages
from classification.data.pixels import Preprocessing
from training import check_name

FOLDER = "few-shot"
DTL_LISTS = "few-shot_split"  # DTL's README renames the folder of the lists so
SHOTS = (1, 2, 4, 8, 16)
SUBSET_SEEDS = (0, 1, 2)


class Published(NamedTuple):
    """What is published about a data set: its classes, and the images for validation and test."""

    classes: int
    validation: int
    test: int


FEW_SHOT = {
    "fgvc-aircraft": Published(100, 3_333, 3_333),
    "food101": Published(101, 20_200, 30_300),
    "oxford-flowers102": Published(102, 1_633, 2_463),
    "oxford-pets": Published(37, 736, 3_669),
    "standford-cars": Published(196, 1_635, 8_041),  # spelled so in the published files
}
LINES = {("oxford-pets", 1): 74}  # each of its 37 images is listed twice; all other lists have shots x classes lines

SOURCES = """Expected in {folder}, for each of {names}:
  <data set>/annotations/  train_meta.list.num_shot_{{1,2,4,8,16}}.seed_{{0,1,2}}, val_meta.list, test_meta.list
  <data set>/images/       the files that the lists name (of standford-cars: <data set>/cars_train and cars_test)
or as DTL has it: few-shot_split/<data set>/annotations/, and the files that the lists name right in <data set>/.
Ways to get them:
  1. the lists: copy data/few-shot of github.com/ZhangYuanhan-AI/NOAH to {folder}
  2. the images: DATASETS.md of github.com/KaiyangZhou/CoOp says where each data set comes from; or an archive of all
     five, as the README of github.com/heekhero/DTL names
Then check them: python scripts/prepare_data.py verify data=few_shot"""


class FewShot(ListedImages):
    """One data set, number of shots and subset from ``<root>/few-shot/<dataset>``; see `ListedImages`.

    The published 1-shot lists of oxford-pets name each of their 37 images twice. Here the training split has 37 images,
    one a class, as in the other data sets; prior code takes two steps where this takes one, on the same images.

    Args:
        root: folder of all data sets.
        dataset: a key of `FEW_SHOT`.
        shots: training images a class.
        subset_seed: which of the three published training lists; results are means over them.
        size: side in pixels.
        normalization: a key of `NORMALIZATIONS`.
        augmentation: "none" or "randaugment", DTL's (see `rand_augment`).
        check_counts: refuse other numbers of images and classes than the published ones.

    Raises:
        FileNotFoundError: files are not there; the message says what to get.
        ValueError: for an unknown name or value, or files that are not as they should be.
    """

    name = "few_shot"
    folder_name = FOLDER
    published: ClassVar[Mapping[str, Published]] = FEW_SHOT

    def __init__(
        self,
        *,
        root: str | Path,
        dataset: str,
        shots: int = 16,
        subset_seed: int = 0,
        size: int = 224,
        normalization: str = "half",
        augmentation: str = "none",
        check_counts: bool = True,
    ) -> None:
        self.check({"dataset": dataset, "shots": shots, "subset_seed": subset_seed})
        self.dataset = dataset
        super().__init__(
            few_shot_folder(Path(root), dataset),
            {"train": _label(shots, subset_seed), "validation": "validation", "test": "test"},
            preprocessing=Preprocessing(size=size, normalization=normalization),
            augmentation=augmentation,
            check_counts=check_counts,
        )

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> None:
        """As `ListedImages.check`."""
        super().check(options)
        for key, known in (("shots", SHOTS), ("subset_seed", SUBSET_SEEDS)):
            if options[key] not in known:
                choices = ", ".join(map(str, known))
                raise ValueError(f"data.{key} is {options[key]!r}; choose from {choices}, as published")

    @classmethod
    def locate(cls, root: Path, dataset: str) -> ListedFolder:
        """See `few_shot_folder`."""
        return few_shot_folder(root, dataset)


def few_shot_folder(root: Path, dataset: str) -> ListedFolder:
    """Where a data set is, in NOAH's layout or, where that is not there, in DTL's; ValueError for an unknown name."""
    check_name("data.dataset", dataset, FEW_SHOT)
    folder, published = root / FOLDER / dataset, FEW_SHOT[dataset]
    annotations, images = folder / "annotations", folder if dataset == "standford-cars" else folder / "images"
    if not annotations.is_dir() and (theirs := root / FOLDER / DTL_LISTS / dataset / "annotations").is_dir():
        annotations, images = theirs, folder
    trains = {
        _label(shots, seed): (
            annotations / f"train_meta.list.num_shot_{shots}.seed_{seed}",
            LINES.get((dataset, shots), shots * published.classes),
        )
        for shots in SHOTS
        for seed in SUBSET_SEEDS
    }
    rest = {
        "validation": (annotations / "val_meta.list", published.validation),
        "test": (annotations / "test_meta.list", published.test),
    }
    return ListedFolder(
        dataset=dataset,
        group="",
        images=images,
        lists={label: file for label, (file, _) in (trains | rest).items()},
        lines={label: lines for label, (_, lines) in (trains | rest).items()},
        classes=published.classes,
        sources=SOURCES.format(folder=root / FOLDER, names=", ".join(FEW_SHOT)),
    )


def _label(shots: int, seed: int) -> str:
    return f"{shots}-shot, seed {seed}"

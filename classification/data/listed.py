"""Images that list files name, read from the disk when they are asked for."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from classification.data.augmentation import AUGMENTATIONS, rand_augment, seeded
from classification.data.dataset import SPLITS
from classification.data.folder import ListedFolder, class_count
from classification.data.lists import check_disjoint
from classification.data.pixels import Preprocessing, read_image
from classification.data.verification import Verification, spaced, verify_folders
from training import check_name

SAMPLES = 64  # files of each split whose bytes enter the fingerprint


class ListedImages:
    """A `ClassificationDataset` of a `ListedFolder`. Index order is that of the lists, one split after the other.

    A list may repeat a line (the published 1-shot lists of oxford-pets have each of their 37 lines twice). The image is
    then one image of the split, once in an epoch, and a warning says how many lines were such.

    Args:
        folder: where lists and images are.
        lists: split -> label of its list; a split without one is empty, and two may have the same.
        preprocessing: of every image.
        augmentation: a key of `AUGMENTATIONS`.
        check_counts: refuse other numbers of lines and classes than the published ones. Without it there are as many
            classes as the labels of these lists say.

    Raises:
        FileNotFoundError: a list or an image is not there; the message says what to get.
        ValueError: for an unknown augmentation, a list that is not of its form or not as published, or an image in two
            lists.
    """

    name: ClassVar[str]
    folder_name: ClassVar[str]
    """The folder of its data sets, in that of all data sets."""
    published: ClassVar[Mapping[str, Any]]
    """Data set -> what is published about it."""

    def __init__(
        self,
        folder: ListedFolder,
        lists: Mapping[str, str],
        *,
        preprocessing: Preprocessing,
        augmentation: str = "none",
        check_counts: bool = True,
    ) -> None:
        if augmentation not in AUGMENTATIONS:
            raise ValueError(f"data.augmentation is {augmentation!r}; choose from {', '.join(AUGMENTATIONS)}")
        read = folder.read(lists.values(), check_counts=check_counts)
        by_split = {split: read[lists[split]] for split in SPLITS if split in lists}
        different = [read[label] for label in dict.fromkeys(lists.values())]  # one list may be two splits
        check_disjoint(different)
        for each in different:
            if each.repeated:
                warnings.warn(
                    f"{each.file}: {each.repeated} of {each.lines} lines repeat an earlier one; each of the "
                    f"{len(each.names)} images counts once",
                    stacklevel=3,
                )
        self.folder = folder
        self.files: tuple[str, ...] = tuple(name for each in by_split.values() for name in each.names)
        self.labels: np.ndarray = np.concatenate([each.labels for each in by_split.values()])
        self.splits: dict[str, np.ndarray] = {}
        start = 0
        for split in SPLITS:
            end = start + (len(by_split[split].names) if split in by_split else 0)
            self.splits[split] = np.arange(start, end)
            start = end
        classes = folder.classes if check_counts else class_count(by_split.values())
        self.classes: tuple[str, ...] = tuple(str(label) for label in range(classes))  # the lists have no other names
        self.augmentation = AUGMENTATIONS[augmentation]
        # of which kind the files are, too: JPEG instead of the source's pixels costs points (NOAH, issue 28)
        kinds = sorted({file.rpartition(".")[2].lower() if "." in file else "unnamed" for file in self.files})
        self.preprocessing = f"{' and '.join(kinds)} files, {preprocessing.text}"
        self._preprocess = preprocessing
        self._augments = augmentation != "none"

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over preprocessing, names of the files, labels, and the bytes of 64 evenly spaced files a split.

        Not over all files, which would read 73,728 before each training of dsprites: data sets that differ in other
        files than these have the same fingerprint.

        Raises:
            FileNotFoundError: if one of them has gone.
        """
        digest = hashlib.sha256("\n".join([self.preprocessing, *self.files]).encode())
        digest.update(self.labels.astype("<i8").tobytes())
        for indices in self.splits.values():
            for index in spaced(indices, SAMPLES):
                content = (self.folder.images / self.files[index]).read_bytes()
                digest.update(f"{index} {len(content)} ".encode() + content)
        return digest.hexdigest()

    def images(self, indices: Sequence[int] | np.ndarray) -> Tensor:
        """``(B, 3, size, size)`` float32, without augmentation; files are decoded here.

        Raises:
            ValueError: a file cannot be read; the message names it.
        """
        if len(indices) == 0:
            return torch.empty(0, 3, self._preprocess.size, self._preprocess.size)
        return torch.stack([self._preprocess(self._read(index)) for index in indices])

    def augmented(self, index: int, seed: int) -> Tensor:
        """``(3, size, size)`` float32, after the augmentation that `augmentation` says.

        The same for the same index and seed (both from 0 on); generators of random numbers are left as they were.

        Raises:
            ValueError: the file cannot be read, or the seed is negative.
        """
        image = self._read(index)
        if not self._augments:
            return self._preprocess(image)
        with seeded(int(index), int(seed)):
            return self._transform(image)

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> None:
        """Raise ValueError for a data set, or a choice of its lists, that is not published; nothing is read."""
        check_name("data.dataset", options["dataset"], cls.published)

    @classmethod
    def locate(cls, root: Path, dataset: str) -> ListedFolder:
        """Where a data set is below the folder of all data sets; raises ValueError for an unknown name."""
        raise NotImplementedError

    @classmethod
    def prepare(
        cls, root: Path, cache: Path, *, datasets: str | Sequence[str] | None = None, check_counts: bool = True
    ) -> None:
        """Check that lists and images are there, with the published counts; they are not made or downloaded.

        Args:
            root: folder of all data sets.
            cache: not used; data sets share one signature.
            datasets: names of `published`, or one; None is all.
            check_counts: as of the class.

        Raises:
            FileNotFoundError: they are not; the message says where they come from and how they are laid out.
            ValueError: they are others.
        """
        folders = cls._folders(root, datasets)
        if absent := [each.dataset for each in folders if not each.is_there]:
            some = "" if len(absent) == len(folders) else "\nTo do with those that are: data.prepare.datasets=[...]"
            raise FileNotFoundError(f"not there: {', '.join(absent)}.\n{folders[0].sources}{some}")
        for folder in folders:
            folder.read(folder.lists, check_counts=check_counts)

    @classmethod
    def verify(
        cls, root: Path, *, datasets: str | Sequence[str] | None = None, check_counts: bool = True, decode: bool = False
    ) -> Verification:
        """Counts of each data set beside the published ones, and what is wrong with its lists and images.

        Args:
            root, datasets, check_counts: as of `prepare`.
            decode: read every image, not a sample of each list.

        Raises:
            FileNotFoundError: none of the data sets is there; the message says how to get them.
        """
        return verify_folders(cls._folders(root, datasets), check_counts=check_counts, decode=decode)

    @classmethod
    def _folders(cls, root: Path, datasets: str | Sequence[str] | None) -> list[ListedFolder]:
        chosen = [datasets] if isinstance(datasets, str) else list(cls.published if datasets is None else datasets)
        if not chosen:
            raise ValueError("data.prepare.datasets is empty; null means all")
        return [cls.locate(Path(root), dataset) for dataset in chosen]

    @cached_property
    def _transform(self) -> Callable[[Image.Image], Tensor]:
        return rand_augment(self._preprocess)

    def _read(self, index: int) -> Image.Image:
        return read_image(self.folder.images / self.files[index])

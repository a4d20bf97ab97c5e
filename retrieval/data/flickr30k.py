"""Flickr30K and COCO as region features in the published files (see `retrieval.regions.precomputed`).

The features that VSE-infinity's numbers are made from are bottom-up attention's, 36 boxes of 2,048 numbers an image.
They are not ours to hand on and no host of theirs is certain to stay, so nothing is downloaded here: `SOURCES` says
where they come from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from retrieval.data.dataset import SPLITS, fingerprint
from retrieval.data.verification import Verification, pretrained_note
from retrieval.regions.pictures import find_picture, inside, placeholder, read_mapping
from retrieval.regions.precomputed import read_precomputed
from retrieval.regions.ragged import Ragged
from retrieval.regions.verify import verify_regions

COUNTS = ("published", "any")
SAMPLES = 64  # images whose features enter the fingerprint
SOURCE = "source.txt"  # its first line says where the features come from; this suite's own scripts write it
SOURCES = """{name} is not in {folder}. Expected there, for each split:
  {files}_ims.npy  features (images, 36, 2048), or (regions, 2048) with ..._offsets.npy
  ..._caps.txt     one caption a line, five lines an image
  ..._ids.txt      one image number a line
Ways to get them:
  1. the published files: SCAN's data (github.com/kuanghuei/SCAN; on Kaggle as kuanghueilee/scan-features) holds
     f30k_precomp and coco_precomp; put the content of {theirs} into {folder}
  2. from bottom-up attention's TSV files and Karpathy's {karpathy}:
     python scripts/convert_regions.py tsv FILE.tsv --karpathy {karpathy} --output {folder}
  3. from pictures of your own, with a detector of torchvision (other features, so other numbers):
     python scripts/extract_regions.py --images PICTURES --karpathy {karpathy} --weights FILE --output {folder}
To train as published: bert-base-uncased's config.json, model.safetensors, tokenizer.json (or vocab.txt) in {bert}
Then check them: python scripts/prepare_data.py verify data={name}"""
BERT = "bert-base-uncased"  # under the root: where conf/model/vse_infty_base.yaml looks for it


class PublishedRegions:
    """One split of a data set in the published files; a `RetrievalDataset` of region features.

    The features stay on the disk: what was read of them is the system's cache, which workers share. Images with
    different numbers of boxes and float16 files are fine.

    Args:
        root: folder of all data sets.
        split: "train", "validation" or "test".
        dev_images: use only so many first images of the validation split. Prior code evaluates on the first 1,000
            (see `retrieval.vse_infty`); None takes all.
        counts: "published": refuse files with other numbers of images and captions than the published ones; "any": do
            not ask.
        pictures: folder with the pictures, for the report; their names come from `id_mapping.json` beside the features
            or are <number>.jpg. Without it, or where a picture is not there, a thumbnail is a grey square with the
            image's number.

    Raises:
        FileNotFoundError: files are missing; the message says how to get them.
        ValueError: unknown split or option, files that do not fit each other or the published counts, or the name of a
            picture that leads out of `pictures`.
    """

    name: ClassVar[str]
    files: ClassVar[Mapping[str, str]]
    """Our split -> the prefix of its files."""
    published: ClassVar[Mapping[str, tuple[int, int]]]
    """Prefix -> images, captions."""
    theirs: ClassVar[str]
    karpathy: ClassVar[str]

    def __init__(
        self,
        root: Path,
        split: str,
        *,
        dev_images: int | None = None,
        counts: str = "published",
        pictures: str | Path | None = None,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}; choose from {', '.join(SPLITS)}")
        if counts not in COUNTS:
            raise ValueError(f"data.counts is {counts!r}; choose from {', '.join(COUNTS)}")
        if pictures is not None and not Path(pictures).is_dir():
            raise FileNotFoundError(f"data.pictures={pictures} is no folder; null shows a placeholder for each picture")
        self._arguments = (root, split, dev_images, counts, pictures)
        self.folder, self.split = Path(root) / self.name, split
        self._check_folder(self.folder)
        read = read_precomputed(self.folder, prefix := self.files[split])
        found, expected = (len(read.features), len(read.captions)), self.published[prefix]
        if counts == "published" and found != expected:
            raise ValueError(
                f"{self.folder / prefix}_* hold {found[0]} images with {found[1]} captions, published are "
                f"{expected[0]} with {expected[1]}; if other files are meant, set data.counts=any"
            )
        keep = len(read.features)
        if dev_images is not None and split == "validation":
            if not 1 <= dev_images <= keep:
                raise ValueError(f"data.dev_images is {dev_images}, but {prefix} has {keep} images; null takes all")
            keep = dev_images
        self.features: np.ndarray | Ragged = read.features[:keep]
        self.ids = read.ids[:keep]
        mine = read.image_of_caption < keep  # a prefix: the captions of an image follow one another, in its order
        self.image_of_caption = read.image_of_caption[mine]
        self.captions = read.captions[: len(self.image_of_caption)]
        self.pictures = None if pictures is None else Path(pictures)
        self.picture_names: dict[int, str] = {}
        if self.pictures is not None:
            names = read_mapping(self.folder)
            self.picture_names = {number: names[number] for number in self.ids.tolist() if number in names}
            for name in self.picture_names.values():
                inside(self.pictures, name)

    def __reduce__(self) -> tuple[Any, ...]:
        # pickled for worker processes that do not fork: a memory map would be sent as an array of 8 GiB
        return _reopen, (type(self), *self._arguments)

    def __len__(self) -> int:
        return len(self.features)

    def visual(self, index: int) -> np.ndarray:
        """``(K, D)`` float32, K = 36 and D = 2,048 in the published files."""
        return np.asarray(self.features[index]).astype(np.float32)

    def thumbnails(self, index: int) -> list[Image.Image]:
        """The picture, or a grey square with its number where there is none; what Pillow raises for a damaged one."""
        number = int(self.ids[index])
        if self.pictures and (path := find_picture(self.pictures, number, self.picture_names)):
            with Image.open(path) as picture:
                return [picture.convert("RGB")]
        return [placeholder(number)]

    @property
    def preprocessing(self) -> str:
        """Which features these are, as far as the files say."""
        if isinstance(self.features, Ragged):
            sizes = self.features.sizes
            boxes, width = f"{sizes.min()} to {sizes.max()}", self.features.rows.shape[1]
        else:
            boxes, width = str(self.features.shape[1]), self.features.shape[2]
        text = f"precomputed region features, {boxes} boxes an image, {width} numbers, {self.features.dtype.name}"
        source = read_source(self.folder)
        return f"{text}; {source}" if source else text

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over captions, owners, image numbers, number and type of the features, and the features of 64 images.

        Not over all features, which would read 8 GiB before each training: files that differ in other images than the
        evenly spaced ones have the same fingerprint.
        """
        chosen = np.unique(np.linspace(0, len(self) - 1, min(SAMPLES, len(self))).astype(int))
        sizes = self.features.sizes if isinstance(self.features, Ragged) else np.array(self.features.shape)
        parts = [np.array([len(self)]), self.ids, sizes, *(np.asarray(self.features[int(i)]) for i in chosen)]
        return fingerprint(self.captions, self.image_of_caption, parts)

    @classmethod
    def prepare(cls, root: Path, cache: Path, *, counts: str = "published") -> None:
        """Check that the files are there and have the published counts; they are not made or downloaded.

        Args:
            root: folder of all data sets.
            cache: not used; data sets share one signature.
            counts: as of the class.

        Raises:
            FileNotFoundError: they are not; the message says where they come from and how they are laid out.
            ValueError: they are others.
        """
        for split in SPLITS:
            cls(root, split, counts=counts)

    @classmethod
    def verify(
        cls,
        root: Path,
        *,
        dev_images: int | None = None,
        counts: str = "published",
        pictures: str | Path | None = None,
        decode: bool = False,
    ) -> Verification:
        """Read the files of all splits: counts, numbers of images, captions, and the features of evenly spaced images.

        Args:
            root: folder of all data sets.
            dev_images, counts, pictures: as of the class; all of dev is read in any case.
            decode: read the features of every image.

        Raises:
            FileNotFoundError: there is no folder of this data set; the message says how to get it.
        """
        folder = Path(root) / cls.name
        cls._check_folder(folder)
        published = {prefix: cls.published[prefix] if counts == "published" else None for prefix in cls.files.values()}
        folder_of_pictures = None if pictures is None else Path(pictures)
        found = verify_regions(folder, published, folder_of_pictures, **({"samples": None} if decode else {}))
        weights = [Path(root) / BERT / file for file in ("model.safetensors", "config.json")]
        return replace(found, notes=[pretrained_note("BERT-base, where model=vse_infty_base starts,", *weights)])

    @classmethod
    def _check_folder(cls, folder: Path) -> None:
        needed = [f"{prefix}_{kind}" for prefix in cls.files.values() for kind in ("ims.npy", "caps.txt")]
        if not any((folder / name).is_file() for name in needed):
            files = "{" + ",".join(cls.files.values()) + "}"
            raise FileNotFoundError(
                SOURCES.format(
                    name=cls.name,
                    folder=folder,
                    files=files,
                    theirs=cls.theirs,
                    karpathy=cls.karpathy,
                    bert=folder.parent / BERT,
                )
            )


def read_source(folder: Path) -> str:
    """Where the features of a folder come from: the first line of its `SOURCE`; "" where that is missing or empty."""
    path = folder / SOURCE
    return path.read_text(encoding="utf-8").partition("\n")[0].strip() if path.is_file() else ""


def _reopen(kind: type[PublishedRegions], root: Path, split: str, *options: Any) -> PublishedRegions:
    return kind(root, split, **dict(zip(("dev_images", "counts", "pictures"), options, strict=True)))


class Flickr30K(PublishedRegions):
    """Flickr30K (Young et al., TACL 2014) in Karpathy's split: 29,000 / 1,014 / 1,000 images, five captions each."""

    name = "flickr30k"
    files: ClassVar[Mapping[str, str]] = {"train": "train", "validation": "dev", "test": "test"}
    published: ClassVar[Mapping[str, tuple[int, int]]] = {
        "train": (29_000, 145_000),
        "dev": (1_014, 5_070),
        "test": (1_000, 5_000),
    }
    theirs = "f30k_precomp"
    karpathy = "dataset_flickr30k.json"


class COCO(PublishedRegions):
    """COCO captions (Lin et al., 2014) in Karpathy's split, restval in train: 113,287 / 5,000 / 5,000 images.

    The test split is the whole "testall". Prior work also reports "1K" numbers, means over five folds of 1,000 images
    of it, which are a good deal higher; `scripts/evaluate.py run=... folds=5` computes them from a run.
    """

    name = "coco"
    files: ClassVar[Mapping[str, str]] = {"train": "train", "validation": "dev", "test": "testall"}
    published: ClassVar[Mapping[str, tuple[int, int]]] = {
        "train": (113_287, 566_435),
        "dev": (5_000, 25_000),
        "testall": (5_000, 25_000),
    }
    theirs = "coco_precomp"
    karpathy = "dataset_coco.json"

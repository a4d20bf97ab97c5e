"""The file format of precomputed region features that SCAN published and VSE-infinity uses.

A folder holds for each split ``{split}_ims.npy`` (n images, K regions, D numbers), ``{split}_caps.txt`` (a caption a
line, those of one image on consecutive lines) and ``{split}_ids.txt`` (the source's number of each image, a line each).
Two layouts of Flickr30K are about: every image once, or every image repeated for each of its five captions.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

CAPTIONS_PER_IMAGE = 5


class Precomputed(NamedTuple):
    """One split: ``features (n, K, D)`` memory-mapped, M ``captions``, ``image_of_caption (M,)`` int64."""

    features: np.ndarray
    captions: list[str]
    image_of_caption: np.ndarray


def read_precomputed(folder: Path, split: str) -> Precomputed:
    """Read one split; features stay on the disk and each image comes once, whichever layout the files have.

    Args:
        folder: where the files are.
        split: the prefix of their names ("train", "dev", "test", ...).

    Raises:
        FileNotFoundError: the features or the captions are missing.
        ValueError: the features are not ``(n, K, D)``, or there are neither 1 nor 5 captions an image.
    """
    images, texts = Path(folder) / f"{split}_ims.npy", Path(folder) / f"{split}_caps.txt"
    for path in (images, texts):
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; precomputed features need {images.name} and {texts.name}")
    features = np.load(images, mmap_mode="r", allow_pickle=False)
    if features.ndim != 3:
        raise ValueError(f"{images} has shape {features.shape}, expected (images, regions, dimensions)")
    # not str.splitlines: it also breaks at U+2028 and U+0085, which captions from the web do hold
    captions = [line.strip() for line in texts.read_text(encoding="utf-8").rstrip("\n").split("\n")]

    per_image, rest = divmod(len(captions), max(len(features), 1))
    if rest or per_image not in (1, CAPTIONS_PER_IMAGE):
        raise ValueError(
            f"{texts.name} has {len(captions)} captions and {images.name} {len(features)} images, "
            f"expected 1 or {CAPTIONS_PER_IMAGE} captions an image; are both files of one split and complete?"
        )
    if per_image == 1 and _is_repeated(features):
        features, per_image = features[::CAPTIONS_PER_IMAGE], CAPTIONS_PER_IMAGE
    return Precomputed(features, captions, np.arange(len(captions), dtype=np.int64) // per_image)


def write_precomputed(folder: Path, split: str, features: np.ndarray, captions: Sequence[str]) -> None:
    """Write one split, every image once, numbered from 0; the captions of an image follow one another."""
    np.save(Path(folder) / f"{split}_ims.npy", features)
    for kind, lines in (("caps", captions), ("ids", range(len(features)))):
        (Path(folder) / f"{split}_{kind}.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _is_repeated(features: np.ndarray) -> bool:
    """Whether rows come in fives of equal ones; three groups are compared, since all of Flickr30K are 40 GB."""
    groups, rest = divmod(len(features), CAPTIONS_PER_IMAGE)
    if rest or not groups:
        return False
    starts = [CAPTIONS_PER_IMAGE * group for group in (0, groups // 2, groups - 1)]
    return all(
        np.array_equal(features[start], features[start + copy])
        for start in starts
        for copy in range(1, CAPTIONS_PER_IMAGE)
    )

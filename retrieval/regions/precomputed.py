"""The file format of precomputed region features that SCAN published and VSE-infinity uses.

A folder holds for each split ``{split}_ims.npy`` (n images, K regions, D numbers), ``{split}_caps.txt`` (a caption a
line, those of one image on consecutive lines) and ``{split}_ids.txt`` (the source's number of each image, a line each).
Two layouts of Flickr30K are about: every image once, or every image repeated for each of its five captions; the numbers
come in either way too, whatever the features do.

Of this suite, for images with different numbers of regions: ``{split}_ims.npy`` is (N, D), the regions of all images
one after another, and ``{split}_offsets.npy`` (n + 1,) int64 says where each image begins. Features may be float32 or
float16.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from retrieval.regions.ragged import Ragged
from retrieval.regions.writing import write_whole

CAPTIONS_PER_IMAGE = 5


class Precomputed(NamedTuple):
    """One split: ``features (n, K, D)`` memory-mapped, or n sets (K_i, D); M ``captions``; ``image_of_caption (M,)``
    int64; ``ids (n,)`` int64, the source's numbers (0, 1, 2, ... where there is no file with them)."""

    features: np.ndarray | Ragged
    captions: list[str]
    image_of_caption: np.ndarray
    ids: np.ndarray


def read_precomputed(folder: Path, split: str) -> Precomputed:
    """Read one split; features stay on the disk and each image comes once, whichever layout the files have.

    Args:
        folder: where the files are.
        split: the prefix of their names ("train", "dev", "test", ...).

    Raises:
        FileNotFoundError: the features or the captions are missing.
        ValueError: a file is not what it should be, or the files do not fit each other; the message says which.
    """
    images, texts, numbers = (Path(folder) / f"{split}_{kind}" for kind in ("ims.npy", "caps.txt", "ids.txt"))
    for path in (images, texts):
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; precomputed features need {images.name} and {texts.name}")
    features = _read_features(images)
    captions = _read_lines(texts)

    per_image, rest = divmod(len(captions), max(len(features), 1))
    if rest or per_image not in (1, CAPTIONS_PER_IMAGE):
        raise ValueError(
            f"{texts.name} has {len(captions)} captions and {images.name} {len(features)} images, "
            f"expected 1 or {CAPTIONS_PER_IMAGE} captions an image; are both files of one split and complete?"
        )
    if per_image == 1 and _is_repeated(features):
        features, per_image = features[::CAPTIONS_PER_IMAGE], CAPTIONS_PER_IMAGE
    ids = read_ids(numbers, len(features)) if numbers.is_file() else np.arange(len(features), dtype=np.int64)
    return Precomputed(features, captions, np.arange(len(captions), dtype=np.int64) // per_image, ids)


def write_precomputed(folder: Path, split: str, features: np.ndarray, captions: Sequence[str]) -> None:
    """Write one split, every image once, numbered from 0; the captions of an image follow one another."""
    np.save(Path(folder) / f"{split}_ims.npy", features)
    write_texts(folder, split, captions, range(len(features)))


def write_texts(folder: Path, split: str, captions: Sequence[str], ids: Sequence[int] | None) -> None:
    """Write the captions and the numbers of the images of one split, each file at once; numbers None: leave theirs."""
    for kind, lines in (("caps", captions), ("ids", ids)):
        if lines is None:
            continue
        write_whole(Path(folder) / f"{split}_{kind}.txt", "".join(f"{line}\n" for line in lines))


def open_npy(path: Path) -> np.ndarray:
    """A .npy file, memory-mapped; what has been read of it is the system's cache, which it takes back when it needs to.

    Raises:
        ValueError: it is no .npy file of numbers, or ends too early.
    """
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as a .npy file of numbers ({error}); is it complete?") from None


def _read_features(path: Path) -> np.ndarray | Ragged:
    features = open_npy(path)
    if features.ndim not in (2, 3) or features.dtype.kind != "f":
        raise ValueError(
            f"{path} holds {features.dtype} of shape {features.shape}, expected floating-point numbers of shape "
            "(images, regions, dimensions); features.astype(numpy.float32) makes such numbers of others"
        )
    if features.ndim == 3:
        return features
    offsets_path = path.with_name(path.name.replace("_ims.npy", "_offsets.npy"))
    if not offsets_path.is_file():
        raise ValueError(
            f"{path} has shape {features.shape}, expected (images, regions, dimensions); or, for images with different "
            f"numbers of regions, {offsets_path.name} beside it"
        )
    offsets = np.array(open_npy(offsets_path))
    if offsets.ndim != 1 or offsets.dtype.kind not in "iu" or not len(offsets):
        raise ValueError(
            f"{offsets_path} holds {offsets.dtype} of shape {offsets.shape}, expected integers (images + 1,)"
        )
    offsets = offsets.astype(np.int64)
    if offsets[0] != 0 or offsets[-1] != len(features) or (np.diff(offsets) < 1).any():
        raise ValueError(
            f"{offsets_path} must rise from 0 to the {len(features)} rows of {path.name}, by one region an image at "
            f"least, but goes from {offsets[0]} to {offsets[-1]} in steps of {np.diff(offsets).min(initial=0)} and more"
        )
    return Ragged(features, offsets[:-1], offsets[1:])


def _read_lines(path: Path) -> list[str]:
    # not str.splitlines: it also breaks at U+2028 and U+0085, which captions from the web do hold; -sig: some
    # editors begin a file with a byte-order mark
    try:
        return [line.strip() for line in path.read_bytes().removesuffix(b"\n").decode("utf-8-sig").split("\n")]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None


def read_ids(path: Path, images: int | None = None) -> np.ndarray:
    """The number of each image, (n,) int64, from a file with a line for each image or for each of its five captions.

    Args:
        path: of `{split}_ids.txt`.
        images: n; None for as many as the file names.

    Raises:
        ValueError: a line is no number, there are not so many images, or one is named twice.
    """
    lines = _read_lines(path)
    if bad := [f"line {number}: {line!r}" for number, line in enumerate(lines, 1) if not line.isdecimal()]:
        raise ValueError(
            f"{path} has lines that are no number ({', '.join(bad[:3])}); expected one image number a line"
        )
    ids = np.array(lines, dtype=np.int64)
    images = len(np.unique(ids)) if images is None else images
    if len(ids) == CAPTIONS_PER_IMAGE * images:
        groups = ids.reshape(-1, CAPTIONS_PER_IMAGE)
        if uneven := np.flatnonzero((groups != groups[:, :1]).any(axis=1)).tolist():
            raise ValueError(
                f"{path} has a line for each caption, but the {CAPTIONS_PER_IMAGE} from line "
                f"{CAPTIONS_PER_IMAGE * uneven[0] + 1} on are not equal; the captions of an image follow one another"
            )
        ids = groups[:, 0]
    if len(ids) != images:
        raise ValueError(
            f"{path} has {len(ids)} lines, expected one for each of {images} images or for each of their "
            f"{CAPTIONS_PER_IMAGE} captions"
        )
    values, counts = np.unique(ids, return_counts=True)
    if (counts > 1).any():
        twice = values[counts > 1]
        raise ValueError(f"{path} names {len(twice)} images more than once, the first is {twice[0]}")
    return ids


def _is_repeated(features: np.ndarray | Ragged) -> bool:
    """Whether rows come in fives of equal ones; three groups are compared, since all of Flickr30K are 40 GB."""
    groups, rest = divmod(len(features), CAPTIONS_PER_IMAGE)
    if rest or not groups:
        return False
    starts = [CAPTIONS_PER_IMAGE * group for group in (0, groups // 2, groups - 1)]
    return all(
        np.array_equal(features[start], features[start + copy], equal_nan=True)
        for start in starts
        for copy in range(1, CAPTIONS_PER_IMAGE)
    )

"""What precomputed feature files hold, looked at before a training starts, and their conversion to float16."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from retrieval.data.verification import SplitCount, Verification
from retrieval.regions.feature_file import FeatureFile
from retrieval.regions.pictures import find_picture, read_mapping
from retrieval.regions.precomputed import Precomputed, open_npy, read_precomputed
from retrieval.regions.writing import only_writer_of

SAMPLES = 256  # images of a split whose features are looked at
NAMED = 3  # images that a problem names
BLOCK = 1 << 24  # bytes that a conversion reads at a time


def verify_regions(
    folder: Path,
    published: Mapping[str, tuple[int, int] | None],
    pictures: Path | None = None,
    samples: int | None = SAMPLES,
) -> Verification:
    """Check the files of each split, in full but for the features.

    Args:
        folder: where the files are.
        published: prefix of a split's files -> the published numbers of images and captions, or None.
        pictures: folder with the pictures, if they have to be there.
        samples: evenly spaced images of a split whose features are looked at; None looks at all.
    """
    splits: list[SplitCount] = []
    problems: list[str] = []
    seen: dict[int, str] = {}
    names = read_mapping(folder) if pictures else {}
    for split, expected in published.items():
        try:
            read = read_precomputed(folder, split)
        except (FileNotFoundError, ValueError) as error:
            problems.append(str(error))
            splits.append(SplitCount(split, 0, 0, published=expected))
            continue
        unreadable, found = _problems(folder, split, read, samples or len(read.features))
        problems += found
        if expected is not None and expected != (len(read.features), len(read.captions)):
            problems.append(
                f"{split} has {len(read.features)} images with {len(read.captions)} captions, published are "
                f"{expected[0]} with {expected[1]}"
            )
        if (folder / f"{split}_ids.txt").is_file():
            numbers = read.ids.tolist()
            if shared := [number for number in numbers if number in seen]:
                problems.append(f"{split} shares {len(shared)} images with {seen[shared[0]]}: {_some(shared)}")
            seen |= dict.fromkeys(numbers, split)
        missing = 0
        if pictures is not None:
            absent = [number for number in read.ids.tolist() if find_picture(pictures, number, names) is None]
            missing = len(absent)
            if absent:
                problems.append(f"{split}: {missing} pictures are not in {pictures}: {_some(absent)}")
        splits.append(
            SplitCount(split, len(read.features), len(read.captions), missing, unreadable, published=expected)
        )
    return Verification(splits, problems)


def _problems(folder: Path, split: str, read: Precomputed, samples: int) -> tuple[int, list[str]]:
    """How many of `samples` images have features that cannot be right, and all problems of a split in words."""
    problems = []
    if not (folder / f"{split}_ids.txt").is_file():
        problems.append(f"{split}_ids.txt is missing: nothing says which images these are (training does not need it)")
    if empty := [line for line, caption in enumerate(read.captions, 1) if not caption]:
        problems.append(f"{split}_caps.txt has {len(empty)} empty captions: line {_some(empty)}")
    sample = np.unique(np.linspace(0, len(read.features) - 1, min(samples, len(read.features))).astype(int)).tolist()
    not_finite, zero = [], []
    for image in tqdm(sample, desc=f"features of {split}", unit="image", leave=False, delay=1):
        features = np.asarray(read.features[image])
        if not np.isfinite(features).all():
            not_finite.append(image)
        elif not features.any(axis=1).all():
            zero.append(image)
    for rows, what in ((not_finite, "hold NaN or infinite numbers"), (zero, "have a region of zeros only")):
        if rows:
            problems.append(
                f"{split}_ims.npy: {len(rows)} of {len(sample)} images that were looked at {what}: row {_some(rows)}"
            )
    return len(not_finite) + len(zero), problems


def _some(items: list[int]) -> str:
    return ", ".join(map(str, items[:NAMED])) + (", ..." if len(items) > NAMED else "")


def to_float16(source: Path, output: Path) -> list[Path]:
    """Copy a folder of feature files with the features as float16; half the disk, and numbers to three digits.

    Returns:
        The feature files written.

    Raises:
        FileNotFoundError: `source` holds no feature files.
        ValueError: `output` has them already (see `only_writer_of`), or a number is too large for float16.
    """
    files = sorted(source.glob("*_ims.npy"))
    if not files:
        raise FileNotFoundError(f"{source} holds no features; expected files such as train_ims.npy")
    with only_writer_of(output, [path.name for path in files]):
        for path in [*source.glob("*.txt"), *source.glob("*.json"), *source.glob("*_offsets.npy")]:
            shutil.copyfile(path, output / path.name)
        for path in files:
            features = open_npy(path)
            rows = features.reshape(-1, features.shape[-1])
            step = max(BLOCK // (rows.shape[1] * rows.itemsize), 1)
            with (
                FeatureFile(output / path.name, rows.shape[1], half=True) as file,
                tqdm(total=len(rows), desc=path.name, unit="region", unit_scale=True) as bar,
            ):
                for start in range(0, len(rows), step):
                    file.write(start, rows[start : start + step])
                    bar.update(min(step, len(rows) - start))
                file.finish(features.shape)
    return [output / path.name for path in files]

"""Extract the features of a split's pictures into the published layout; a killed extraction goes on where it was.

Pictures are taken in order and their regions appended to `{split}_ims.npy.partial`. A journal beside it has a line for
each picture that is done, written after its regions, so that what the journal says is on the disk. One process at a
time extracts a split; a second one waits, and finds it finished.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps
from tqdm.auto import tqdm

from retrieval.locking import only_writer
from retrieval.regions.bottom_up import save_offsets
from retrieval.regions.feature_file import FeatureFile
from retrieval.regions.journal import Journal
from retrieval.regions.karpathy import Described
from retrieval.regions.pictures import inside
from retrieval.regions.precomputed import open_npy, write_texts


class Unreadable(NamedTuple):
    """A picture that could not be opened, and why."""

    file: str
    reason: str


def extract(
    split: str,
    images: Sequence[Described],
    pictures: Path,
    folder: Path,
    features_of: Callable[[Image.Image], np.ndarray],
    *,
    width: int,
    fixed: bool,
    half: bool,
    source: str,
) -> list[Unreadable]:
    """Write `{split}_ims.npy` (and `_offsets.npy`), `_caps.txt` and `_ids.txt`; nothing if the split is there already.

    Args:
        split: prefix of the files.
        images: in the order of the output.
        pictures: folder of the pictures.
        folder: of the output.
        features_of: picture -> (K, width) float32.
        width: of a feature.
        fixed: whether K is the same for all.
        half: store float16.
        source: what the features depend on, in words; going on with others is refused.

    Returns:
        The pictures that could not be read. They and their captions are left out of the split and listed in
        `{split}_unreadable.txt`.

    Raises:
        ValueError: the extraction was begun or finished in another way or for other pictures, pictures that were not
            there when it finished are there now, a picture's name leads out of the folder, no picture could be
            read, or a picture's features are not finite (or too large for float16).
    """
    path, listed = folder / f"{split}_ims.npy", folder / f"{split}_unreadable.txt"
    settings = {"source": source, "half": half, "images": len(images), "pictures": _digest(images)}
    journal = Journal(folder / f"{split}_ims.npy.journal", settings)
    with only_writer(folder / f"{split}_ims.npy.lock"):
        if path.is_file():
            unreadable = [Unreadable(*line.split("\t", 1)) for line in _lines(listed)]
            _check_finished(path, folder / f"{split}_ids.txt", images, unreadable, half=half)
            _check_still_missing(path, pictures, unreadable)
            journal.path.unlink(missing_ok=True)
            return unreadable
        paths = [inside(pictures, image.file) for image in images]
        done = journal.begin(FeatureFile.rows_there(path, width, half=half), [image.number for image in images])
        row = sum(entry["boxes"] for entry in done)
        with (
            FeatureFile(path, width, half=half, keep_rows=row) as file,
            tqdm(total=len(images), initial=len(done), desc=split, unit="picture") as bar,
        ):
            for image, picture in list(zip(images, paths, strict=True))[len(done) :]:
                entry: dict[str, Any] = {"number": image.number, "boxes": 0}
                try:
                    pixels = read_picture(picture)
                except Exception as error:  # whatever Pillow's decoders raise, it is the file's fault
                    entry["unreadable"] = " ".join(f"{type(error).__name__}: {error}".split())
                else:
                    features = features_of(pixels)
                    _store(file, row, features, picture)
                    file.flush()
                    entry["boxes"] = len(features)
                    row += len(features)
                done.append(entry)
                journal.append(entry)
                bar.update()
            there = [image for image, entry in zip(images, done, strict=True) if "unreadable" not in entry]
            if not there:
                reason = done[0]["unreadable"]
                raise ValueError(f"none of the {len(images)} pictures of {split} could be read: {reason}")
            unreadable = [
                Unreadable(image.file, entry["unreadable"])
                for image, entry in zip(images, done, strict=True)
                if "unreadable" in entry
            ]
            listed.write_text("".join(f"{item.file}\t{item.reason}\n" for item in unreadable), encoding="utf-8")
            captions = [caption for image in there for caption in image.captions]
            write_texts(folder, split, captions, [image.number for image in there])
            sizes = [entry["boxes"] for entry in done if "unreadable" not in entry]
            save_offsets(folder, split, None if fixed else np.cumsum([0, *sizes]))
            file.finish((len(there), row // len(there), width) if fixed else (row, width))
        journal.path.unlink()
        return unreadable


def read_picture(path: Path) -> Image.Image:
    """A picture in RGB, turned as its EXIF data say."""
    with Image.open(path) as picture:
        return ImageOps.exif_transpose(picture).convert("RGB")


def _store(file: FeatureFile, row: int, features: np.ndarray, picture: Path) -> None:
    try:
        file.write(row, features)
    except ValueError as error:
        raise ValueError(
            f"the regions of {picture} cannot be stored: {error}; look at it and at the detector's weights. Launched "
            "again, the extraction goes on with this picture, or without it once its file has been moved away"
        ) from None


def _digest(images: Sequence[Described]) -> str:
    """Of their numbers and files, in order."""
    return hashlib.sha256(json.dumps([(image.number, image.file) for image in images]).encode()).hexdigest()[:16]


def _check_finished(
    path: Path, ids: Path, images: Sequence[Described], unreadable: Sequence[Unreadable], *, half: bool
) -> None:
    stored, wanted = open_npy(path).dtype, "float16" if half else "float32"
    if stored != wanted:
        raise ValueError(
            f"{path} is finished and holds {stored}, but {wanted} is asked for; ask for {stored} "
            f"({'without' if half else 'with'} --float16), choose another folder for the output, or delete the file to "
            "extract it anew"
        )
    left_out = {item.file for item in unreadable}
    if _lines(ids) != [str(image.number) for image in images if image.file not in left_out]:
        raise ValueError(
            f"{path} is finished and holds other pictures than the {len(images)} that are asked for: {ids.name} does "
            "not list their numbers; give the split file that it was made with, choose another folder for the output, "
            "or delete the file to extract it anew"
        )


def _check_still_missing(path: Path, pictures: Path, unreadable: Sequence[Unreadable]) -> None:
    missing = [item.file for item in unreadable if item.reason.startswith(FileNotFoundError.__name__)]
    if there := [file for file in missing if inside(pictures, file).is_file()]:
        raise ValueError(
            f"{path} is finished without {len(missing)} pictures that were missing; {len(there)} pictures are there "
            f"now, {there[0]} for one; delete {path} to extract anew"
        )


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []

"""Karpathy's split files, dataset_flickr30k.json and dataset_coco.json: which image is in which split, its captions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from retrieval.regions.precomputed import CAPTIONS_PER_IMAGE

SPLITS = {"train": "train", "restval": "train", "val": "dev", "test": "test"}  # theirs -> that of the feature files
NUMBERS = ("imgid", "cocoid", "filename")


class Described(NamedTuple):
    """An image: the number by which it is known, its file (from the folder of pictures on) and five captions."""

    number: int
    file: str
    captions: tuple[str, ...]


class Karpathy(NamedTuple):
    """What a file says.

    Attributes:
        name: "flickr30k", "coco", ...
        splits: "train", "dev", "test" (COCO's is called "testall", as its files are) -> images in the file's order.
        left_out: captions beyond the fifth of an image, which the published files do not have either.
    """

    name: str
    splits: dict[str, list[Described]]
    left_out: int

    @property
    def left_out_note(self) -> str:
        return f"{self.left_out} captions beyond the fifth of an image were left out, as the published files do"


def read_karpathy(path: Path, numbers: str = "imgid") -> Karpathy:
    """Read a split file. COCO's restval belongs to train.

    Args:
        path: of the JSON file.
        numbers: what an image's number is: "imgid" (the position in this file; that of Flickr30K's published files),
            "cocoid" (COCO's own), or "filename" (the last digits of the file's name: 1000092795.jpg ->
            1000092795, COCO_val2014_000000391895.jpg -> 391895).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not of this format, a caption is no text, an image has less than five captions or lacks the
            number, or two images have the same one.
    """
    if numbers not in NUMBERS:
        raise ValueError(f"unknown numbers {numbers!r}; choose from {', '.join(NUMBERS)}")
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; expected a split file such as dataset_flickr30k.json")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        name, images = str(content["dataset"]), list(content["images"])
        if not images:
            raise ValueError("it names no image")
        splits: dict[str, list[Described]] = {}
        left_out, not_text = 0, list[str]()
        for image in images:
            given = [sentence["raw"] for sentence in image["sentences"]]
            captions = [" ".join(str(caption).split()) for caption in given]
            left_out += max(len(captions) - CAPTIONS_PER_IMAGE, 0)
            split = SPLITS[image["split"]]
            file = "/".join(part for part in (image.get("filepath"), str(image["filename"])) if part)
            not_text += [f"{caption!r} of {file}" for caption in given if not isinstance(caption, str)]
            if len(captions) < CAPTIONS_PER_IMAGE:
                raise ValueError(f"{file} has {len(captions)} captions, expected {CAPTIONS_PER_IMAGE} or more")
            described = Described(_number(image, numbers), file, tuple(captions[:CAPTIONS_PER_IMAGE]))
            splits.setdefault("testall" if (name, split) == ("coco", "test") else split, []).append(described)
        if not_text:
            raise ValueError(f"{len(not_text)} captions are no text, {not_text[0]} for one; write what is missing")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"{error} is missing or unknown" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path} does not fit the format of Karpathy's split files: {what}") from None
    seen: dict[int, str] = {}
    for described in (image for split in splits.values() for image in split):
        if described.number in seen:
            both = f"{seen[described.number]} and {described.file}"
            raise ValueError(f"{path}: {both} both have the {numbers} {described.number}")
        seen[described.number] = described.file
    return Karpathy(name, splits, left_out)


def _number(image: dict[str, Any], numbers: str) -> int:
    if numbers != "filename":
        return int(image[numbers])
    stem = Path(image["filename"]).stem
    digits = stem[len(stem.rstrip("0123456789")) :]
    if not digits:
        raise ValueError(f"the file name {image['filename']} does not end in a number")
    return int(digits)

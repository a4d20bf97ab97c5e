"""What a data set is, for those who train and evaluate: one split of it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from filelock import FileLock
from PIL import Image

SPLITS = ("train", "validation", "test")


class RetrievalDataset(Protocol):
    """One split: ``len(dataset)`` visual items, each described by one or several captions.

    Attributes:
        name: the data set's key in `DATASETS`.
        split: one of `SPLITS`.
        captions: M sentences.
        image_of_caption: ``(M,)`` int64, the visual item that each caption describes.
    """

    name: str
    split: str
    captions: Sequence[str]
    image_of_caption: np.ndarray

    @property
    def fingerprint(self) -> str:
        """SHA-256 over captions, owners and visual bytes, so that a run can say what it saw."""
        ...

    @property
    def preprocessing(self) -> str:
        """How pictures or clips became what `visual` returns; part of what a result depends on."""
        ...

    def __len__(self) -> int:
        """Number of visual items."""
        ...

    def visual(self, index: int) -> np.ndarray:
        """``(K, D)`` float32 region features, or ``(T, H, W, 3)`` uint8 frames."""
        ...

    def thumbnails(self, index: int) -> list[Image.Image]:
        """For people: one picture, or the frames of a clip."""
        ...


def check_prepared(folder: Path, name: str, split: str) -> None:
    """Raise a `ValueError` for an unknown split and a `FileNotFoundError` for data that are not there."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose from {', '.join(SPLITS)}")
    if not folder.is_dir():
        raise FileNotFoundError(f"{name} is not prepared in {folder}; run: python scripts/prepare_data.py data={name}")


def make_once(folder: Path, options: dict[str, Any], artwork: str, build: Callable[[Path], None]) -> None:
    """Let `build` fill `folder`, unless it is there already; nothing that looks finished is left by a killed call.

    Args:
        folder: of the data set; appears when it is complete, with the options in ``manifest.json``.
        options: what the data depend on.
        artwork: licence of what the data were made from.
        build: fills the folder that it is given.

    Raises:
        ValueError: if the folder was made with other options.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{folder.name}.lock"):
        if folder.is_dir():
            made = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["options"]
            if made != options:
                raise ValueError(
                    f"{folder} was prepared with {made}, not with {options}; delete it or choose another root"
                )
            return
        unfinished = folder.parent / f".unfinished-{folder.name}"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        build(unfinished)
        manifest = json.dumps({"options": options, "artwork": artwork}, ensure_ascii=False, indent=1)
        (unfinished / "manifest.json").write_text(manifest, encoding="utf-8")
        os.replace(unfinished, folder)


def fingerprint(captions: Sequence[str], image_of_caption: np.ndarray, visual: Iterable[np.ndarray | bytes]) -> str:
    """SHA-256 of a split, independent of the byte order of the machine and of how its files are laid out.

    Args:
        captions: M sentences.
        image_of_caption: ``(M,)`` owners.
        visual: every visual item in order, as an array or as the bytes (or the digest) of its file.
    """
    digest = hashlib.sha256()
    for caption, owner in zip(captions, image_of_caption.tolist(), strict=True):
        digest.update(f"{owner}\t{caption}\n".encode())
    for item in visual:
        if isinstance(item, np.ndarray):
            digest.update(f"{item.dtype.name}{item.shape}".encode())
            digest.update(np.ascontiguousarray(item, dtype=item.dtype.newbyteorder("<")).data)
        else:
            digest.update(item)
    return digest.hexdigest()

"""Tiny data folders in the published format of precomputed region features, written with numpy alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np

WORDS = ("dog", "child", "ball", "red", "jumps", "water", "street", "man", "sits", "blue")


def features_of(images: int, regions: int = 36, width: int = 12, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((images, regions, width), dtype=np.float32)


def captions_of(images: int, seed: int = 0) -> list[str]:
    random = np.random.default_rng(seed)
    return [" ".join(random.choice(WORDS, 5)) for _ in range(5 * images)]


def write_split(
    folder: Path,
    split: str,
    features: np.ndarray | list[np.ndarray],
    captions: list[str] | None = None,
    *,
    first_id: int = 0,
    repeated: bool = False,
    repeated_ids: bool = False,
) -> None:
    """Features as an array (n, K, D), or as a list of (K_i, D) for the ragged layout."""
    folder.mkdir(parents=True, exist_ok=True)
    count = len(features)
    captions = captions_of(count, seed=first_id) if captions is None else captions
    if isinstance(features, list):
        np.save(folder / f"{split}_ims.npy", np.concatenate(features))
        np.save(folder / f"{split}_offsets.npy", np.cumsum([0, *map(len, features)]).astype(np.int64))
    else:
        np.save(folder / f"{split}_ims.npy", np.repeat(features, 5, axis=0) if repeated else features)
    ids = [first_id + image for image in range(count) for _ in range(5 if repeated_ids else 1)]
    (folder / f"{split}_caps.txt").write_text("".join(f"{line}\n" for line in captions), encoding="utf-8")
    (folder / f"{split}_ids.txt").write_text("".join(f"{line}\n" for line in ids), encoding="utf-8")


def write_folder(
    folder: Path, images: tuple[int, int, int] = (24, 8, 6), *, repeated: bool = False, **shape: int
) -> None:
    """The three splits of Flickr30K."""
    for number, (split, count) in enumerate(zip(("train", "dev", "test"), images, strict=True)):
        found = features_of(count, seed=number, **shape)
        write_split(folder, split, found, first_id=1000 * number, repeated=repeated, repeated_ids=repeated)

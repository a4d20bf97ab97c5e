"""What comes in, checked before any work is done: embeddings become unit rows, correspondences become indices."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

BLOCK_SIZE = 4096  # rows that are in float64 at a time: 34 MB at D = 1,024


def unit_rows(values: ArrayLike, name: str) -> NDArray[np.float32]:
    """Scale each row to length 1, so that inner products are cosines.

    The arithmetic is float64 and only the result float32, so neither 1e-30 nor 1e30 leaves the range, and rows that
    differ by a positive factor end, but for rare roundings, in the same bytes. Only BLOCK_SIZE rows at a time are held
    in float64, and read, where `values` is memory-mapped.

    Args:
        values: array or torch tensor (real numbers of any type, bfloat16 included) of shape (N, D), N and D at least 1.
        name: what the caller calls the array; errors start with it.

    Returns:
        (N, D) float32, C-contiguous, each row of length 1.

    Raises:
        ValueError: for another shape or type, for NaN or infinite entries, and for rows of zeros: no direction.
    """
    rows: Any = values if hasattr(values, "detach") else np.asarray(values)
    if rows.ndim != 2 or 0 in rows.shape:
        raise ValueError(
            f"{name}: expected one embedding a row, shape (N, D) with N, D >= 1; received shape {tuple(rows.shape)}"
        )
    kind = getattr(rows.dtype, "name", str(rows.dtype))  # of NumPy, or of torch
    if "float" not in kind and "int" not in kind:
        raise ValueError(f"{name}: expected real numbers; received {kind}")
    unit = np.empty(tuple(rows.shape), dtype=np.float32)
    broken = empty = 0
    for start in range(0, len(rows), BLOCK_SIZE):
        block = np.asarray(_off_device(rows[start : start + BLOCK_SIZE]), dtype=np.float64, order="C")
        largest = np.abs(block).max(axis=1, keepdims=True)
        broken += int(np.count_nonzero(~np.isfinite(largest)))  # the maximum of a row with a NaN is NaN
        empty += int(np.count_nonzero(largest == 0))
        if broken or empty:
            continue  # only counted on
        block = block / largest  # first to a largest entry of 1: the squares can neither overflow nor vanish
        unit[start : start + BLOCK_SIZE] = block / np.linalg.norm(block, axis=1, keepdims=True)
    if broken:
        raise ValueError(
            f"{name}: {broken} of {len(rows)} rows hold NaN or infinite values, so they have no rank; "
            "look for a diverged run or an overflow in half precision"
        )
    if empty:
        raise ValueError(
            f"{name}: {empty} of {len(rows)} rows are all zeros and have no direction, so no cosine; "
            "look for rows that were allocated and never filled"
        )
    return unit


def caption_owners(
    image_of_text: ArrayLike, n_images: int, *, distractors: bool = False, name: str = "image_of_text"
) -> NDArray[np.int64]:
    """Check the correspondence: each caption has one image, each image at least one caption.

    Args:
        image_of_text: (M,) integers in 0..n_images-1, the image that caption m describes.
        n_images: number of images N.
        distractors: whether images without a caption are meant.
        name: what the caller calls the first; errors start with it.

    Returns:
        (M,) int64.

    Raises:
        ValueError: for another shape or type, an image out of range, or images without a caption that are not meant.
    """
    owners = np.asarray(image_of_text.cpu() if hasattr(image_of_text, "cpu") else image_of_text)
    if owners.ndim != 1 or not np.issubdtype(owners.dtype, np.integer):
        raise ValueError(f"{name}: expected integers of shape (M,); received {owners.dtype}, shape {owners.shape}")
    outside = int(np.count_nonzero((owners < 0) | (owners >= n_images)))
    if outside:
        raise ValueError(
            f"{name}: {outside} of {len(owners)} entries are outside 0..{n_images - 1}; "
            f"it must index the rows of images, of which there are {n_images}"
        )
    owners = owners.astype(np.int64)
    silent = int(np.count_nonzero(np.bincount(owners, minlength=n_images) == 0))
    if silent and not distractors:
        raise ValueError(
            f"{silent} of {n_images} images have no caption, so image-to-text has no right answer for them; "
            "add their captions, leave those images out, or keep them for text-to-image alone (distractors=True, "
            "--distractors)"
        )
    return owners


def _off_device(values: Any) -> Any:
    """A torch tensor as float64 on the CPU (NumPy has no bfloat16, nor gradients); anything else as it is."""
    return values.detach().cpu().double() if hasattr(values, "detach") else values

"""Clips as a batch: pixels stay bytes, a quarter of their size as float32, until they are on the model's device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class CollateFrames:
    """Clips of (T_b, H, W, 3) uint8 frames -> zero-padded frames (B, T, H, W, 3) uint8, mask (B, T).

    A clip may have no frame, T_b = 0; T is 1 at least. Not a method of the model, which would be sent along to the
    processes that load data.

    Args:
        size: (H, W) that the image tower takes, in pixels.

    Raises:
        ValueError: frames are not of this size.
    """

    size: tuple[int, int]

    def __call__(self, items: Sequence[np.ndarray]) -> dict[str, Tensor]:
        expected = (*self.size, 3)
        if wrong := next((item.shape for item in items if len(item) and item.shape[1:] != expected), None):
            raise ValueError(
                f"frames are {wrong[1:]}, but the image tower takes {expected}; let the data set and the model agree: "
                f"data.size={self.size[0]} model.image_size={self.size[0]}"
            )
        lengths = torch.tensor([len(item) for item in items])
        mask = torch.arange(max(1, int(lengths.max()))) < lengths[:, None]
        frames = torch.zeros(*mask.shape, *expected, dtype=torch.uint8)
        for row, item in zip(frames, items, strict=True):
            row[: len(item)] = torch.from_numpy(item)
        return {"frames": frames, "frame_mask": mask}


def normalise_frames(frames: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 frames (..., H, W, 3) -> float32 (..., 3, H, W): each channel in [0, 1], minus its mean, over its std."""
    if frames.dtype != torch.uint8 or frames.ndim < 4 or frames.shape[-1] != 3:
        raise ValueError(f"frames are {frames.dtype} {tuple(frames.shape)}, expected torch.uint8 (..., H, W, 3)")
    channel = torch.tensor([mean, std], dtype=torch.float32, device=frames.device)
    return ((frames.float() / 255 - channel[0]) / channel[1]).movedim(-1, -3).contiguous()

"""Clips as the authors of CLIP4Clip read them: seek, decode and transform a frame a second, keep some of them after."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's


def prior_clip(path: Path, frames: int, size: int) -> Tensor:
    """(frames, 3, size, size) float32, normalised and zero-padded; every sampled frame is transformed, then sliced."""
    images = [_transform(size)(Image.fromarray(frame).convert("RGB")) for frame in frames_a_second(path)]
    clip = np.stack([image.numpy() for image in images])
    if len(clip) > frames:
        clip = clip[np.linspace(0, len(clip) - 1, frames, dtype=int)]
    padded = np.zeros((frames, 3, size, size))  # float64, as theirs is
    padded[: len(clip)] = clip
    return torch.from_numpy(padded).float()


def frames_a_second(path: Path) -> Iterator[np.ndarray]:
    """RGB frames (H, W, 3) uint8, one a second, with OpenCV."""
    capture = cv2.VideoCapture(str(path))
    rate, total = int(capture.get(cv2.CAP_PROP_FPS)), int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    for second in range(-(-total // rate) + 1):
        capture.set(cv2.CAP_PROP_POS_FRAMES, second * rate)
        found, frame = capture.read()
        if not found:
            break
        yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
    capture.release()


@cache
def _transform(size: int) -> Callable[[Image.Image], Tensor]:
    return transforms.Compose(
        [
            transforms.Resize(size, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(size),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )

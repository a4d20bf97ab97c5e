"""Clips as the authors of CLIP4Clip read them: seek, decode and transform a frame a second, keep some of them after.

`WAYS` says how the frames of a second are got at. The authors use OpenCV; where it is not installed, PyAV stands in for
it twice: seeking for each frame as OpenCV's CAP_PROP_POS_FRAMES does (to the key frame before frame n - 16, then on to
frame n), and decoding the file once from start to end, which is kinder to prior code than it is itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's


def prior_clip(path: Path, frames_a_second: Callable[[Path], Iterator[np.ndarray]], frames: int, size: int) -> Tensor:
    """(frames, 3, size, size) float32, normalised and zero-padded; every sampled frame is transformed, then sliced."""
    images = [_transform(size)(Image.fromarray(frame).convert("RGB")) for frame in frames_a_second(path)]
    clip = np.stack([image.numpy() for image in images])
    if len(clip) > frames:
        clip = clip[np.linspace(0, len(clip) - 1, frames, dtype=int)]
    padded = np.zeros((frames, 3, size, size))  # float64, as theirs is
    padded[: len(clip)] = clip
    return torch.from_numpy(padded).float()


def opencv(path: Path) -> Iterator[np.ndarray]:
    """RGB frames (H, W, 3) uint8, one a second, with OpenCV."""
    import cv2

    capture = cv2.VideoCapture(str(path))
    rate, total = int(capture.get(cv2.CAP_PROP_FPS)), int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    for second in range(-(-total // rate) + 1):
        capture.set(cv2.CAP_PROP_POS_FRAMES, second * rate)
        found, frame = capture.read()
        if not found:
            break
        yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
    capture.release()


def seeking(path: Path) -> Iterator[np.ndarray]:
    """The same with PyAV, with a seek for each frame."""
    with av.open(str(path)) as container:
        stream, rate, ticks = _opened(container)
        for wanted in range(0, stream.frames, rate):
            container.seek(max(wanted - 16, 0) * ticks, stream=stream, backward=True)
            for frame in container.decode(stream):
                if (frame.pts or 0) >= wanted * ticks:
                    yield frame.to_ndarray(format="rgb24")
                    break


def in_order(path: Path) -> Iterator[np.ndarray]:
    """The same with PyAV, decoding every frame once."""
    with av.open(str(path)) as container:
        stream, rate, _ = _opened(container)
        for number, frame in enumerate(container.decode(stream)):
            if number % rate == 0:
                yield frame.to_ndarray(format="rgb24")


def _opened(container: Any) -> tuple[Any, int, int]:
    """The video stream, whole frames a second, and units of time a frame (for the constant rates of this benchmark)."""
    stream = container.streams.video[0]
    stream.thread_count = 1
    return stream, int(stream.average_rate), int(1 / (stream.average_rate * stream.time_base))


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


WAYS: dict[str, Callable[[Path], Iterator[np.ndarray]]] = (
    {"OpenCV": opencv} if find_spec("cv2") else {"PyAV, seeking as OpenCV does": seeking, "PyAV, in order": in_order}
)

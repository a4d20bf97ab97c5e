"""How the frames of a clip are read: one value that a data set, its frame cache and a run's record share.

reading = Reading(frames=12, frames_per_second=1.0, size=224)   # CLIP4Clip
reading.of("video7010.mp4")                                     # (T <= 12, 224, 224, 3) uint8
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from retrieval.video.frames import BACKENDS, RESIZING, SLICINGS, read_frames
from retrieval.video.timeline import VideoError, timeline


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The arguments of `read_frames`, checked once instead of at the first clip.

    Args:
        frames: the most frames of a clip.
        frames_per_second: one candidate each so many of a second, or None to choose among all frames.
        slicing: which candidates to keep when there are more than `frames`: "uniform", "head" or "tail".
        size: side in pixels of the square to resize (short side, bicubic) and centre-crop to; None leaves frames as is.
        resizing: "pillow", or "decoder" for less work on large videos; see `read_frames`.
        backend: of `retrieval.video.frames.BACKENDS`; with "pillow", the frames do not depend on it.
    """

    frames: int
    frames_per_second: float | None = None
    slicing: str = "uniform"
    size: int | None = None
    resizing: str = "pillow"
    backend: str = "decord"

    def __post_init__(self) -> None:
        for name in ("frames", "size"):
            value = getattr(self, name)
            if not (value is None and name == "size") and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} is {value!r}; expected a whole number, at least 1")
        if self.frames_per_second is not None and not 0 < self.frames_per_second < float("inf"):
            raise ValueError(
                f"frames_per_second is {self.frames_per_second}; expected a positive rate, or null for all"
            )
        for name, known in (("slicing", SLICINGS), ("resizing", RESIZING), ("backend", tuple(BACKENDS))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(known)}")

    def of(self, path: str | PathLike[str]) -> np.ndarray:
        """The frames of a file, (T, H, W, 3) uint8 with 1 <= T <= frames; VideoError where it cannot be read."""
        return read_frames(
            path,
            self.frames,
            slicing=self.slicing,
            frames_per_second=self.frames_per_second,
            size=self.size,
            resizing=self.resizing,
            backend=self.backend,
        )

    def none(self) -> np.ndarray:
        """(0, H, W, 3) uint8, what stands for a clip without frames; H = W = 0 where no size is given."""
        return np.zeros((0, self.size or 0, self.size or 0, 3), np.uint8)

    @property
    def options(self) -> dict[str, Any]:
        """What the frames depend on, for JSON."""
        left_out = {"backend"} if self.resizing == "pillow" else set()
        return {name: value for name, value in asdict(self).items() if name not in left_out}

    @property
    def key(self) -> str:
        """The name of a folder for frames read in this way: "12_uniform_at_1_fps_224_px"."""
        rate = "" if self.frames_per_second is None else f"_at_{self.frames_per_second:g}_fps"
        scaled = f"_{self.backend}" if self.resizing == "decoder" else ""
        return f"{self.frames}_{self.slicing}{rate}_{f'{self.size}_px' if self.size else 'as_stored'}{scaled}"

    def __str__(self) -> str:
        rate = "" if self.frames_per_second is None else f" of {self.frames_per_second:g} a second"
        size = f"{self.size} px bicubic by {self.resizing}" if self.size else "as stored"
        return f"at most {self.frames} frames{rate}, {self.slicing}, {size}, {self.backend}"


def problem_of(path: Path, reading: Reading | None = None) -> str:
    """Why a video cannot be read, "" if it can: its index is read, and its frames decoded if `reading` says which.

    Here and not beside a data set, so that a process that calls it need not import more.
    """
    try:
        if reading is None:
            timeline(path)
        else:
            reading.of(path)
    except VideoError as error:
        return error.reason
    return ""

"""How fast clips are read: our two backends and the frame cache beside the way of CLIP4Clip's authors, same files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import av
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from benchmarks.machine import described
from benchmarks.measure import paired_ratios
from benchmarks.options import Options, option
from benchmarks.prior_video import MEAN, STD, prior_clip
from benchmarks.video_page import page
from retrieval.clip4clip import normalise_frames
from retrieval.video.cache import CacheFiles, FrameCache
from retrieval.video.cache_writer import write_cache
from retrieval.video.reading import Reading

WARM_UP = 2
SCENE = 5  # seconds between two cuts
GRAIN = 8.0  # standard deviation of the noise, of 255


@dataclass(frozen=True, kw_only=True)
class Settings(Options):
    """What is run."""

    clips: int = option(10, "videos, encoded for the purpose")
    seconds: int = option(30, "length of a video")
    width: int = option(320, "pixels, even")
    height: int = option(240, "pixels, even")
    rate: int = option(25, "frames a second of a video")
    frames: int = option(12, "frames that are kept of a clip")
    size: int = option(224, "pixels that they are resized to")
    pairs: int = option(30, "pairs of reads for each row")
    threads: int = option(1, "compute threads; a data loader's worker has one")

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.width, self.height) < 16 or self.width % 2 or self.height % 2:
            raise ValueError(f"videos of {self.width} x {self.height}; expected even numbers of pixels from 16 on")


class Reader:
    """One way of reading, called for one clip after the other; `seconds` are what each call took."""

    def __init__(self, read: Callable[[Path], Tensor], paths: list[Path]) -> None:
        self.read, self.paths = read, cycle(paths)
        self.seconds: list[float] = []

    def __call__(self) -> None:
        path, start = next(self.paths), perf_counter()
        self.read(path)
        self.seconds.append(perf_counter() - start)


def run(settings: Settings) -> tuple[str, dict[str, Any]]:
    """Encode the videos, measure -> the page and the raw numbers."""
    with TemporaryDirectory() as folder:
        paths = [Path(folder) / f"clip{number}.mp4" for number in range(settings.clips)]
        for number, path in enumerate(tqdm(paths, desc="encoding", unit="clip")):
            encode(path, number, settings)
        megabytes = sum(path.stat().st_size for path in paths) / 1e6
        cache = write_cache(
            CacheFiles(Path(folder), "clips", reading(settings)), {path.stem: path for path in paths}, workers=0
        )
        rows = measured(paths, cache, settings)
    results = {"settings": described(settings), "megabytes": megabytes, "rows": rows}
    return page(results), results


def reading(settings: Settings, backend: str = "decord") -> Reading:
    return Reading(frames=settings.frames, frames_per_second=1.0, size=settings.size, backend=backend)


def ours(settings: Settings, cache: FrameCache) -> dict[str, Callable[[Path], Tensor]]:
    """Our ways, each from a path to (T, 3, size, size) float32, normalised."""

    def normalised(frames: np.ndarray) -> Tensor:
        return normalise_frames(torch.from_numpy(frames)[None], MEAN, STD)[0]

    return {
        "decord": lambda path: normalised(reading(settings, "decord").of(path)),
        "PyAV": lambda path: normalised(reading(settings, "pyav").of(path)),
        "frame cache": lambda path: normalised(cache.frames(path.stem)),
    }


def measured(paths: list[Path], cache: FrameCache, settings: Settings) -> list[dict[str, Any]]:
    """For each of our ways: ratios of paired reads of one clip to prior code's, and the seconds of both."""
    ways, rows = ours(settings, cache), []
    theirs = partial(prior_clip, frames=settings.frames, size=settings.size)
    with tqdm(total=len(ways) * (settings.pairs + WARM_UP), desc="time", unit="pair") as bar:
        for name, read in ways.items():
            bar.set_postfix_str(name)
            plain, measured_one = Reader(theirs, paths), Reader(read, paths)
            ratios = paired_ratios(plain, measured_one, settings.pairs, warm_up=WARM_UP, progress=bar.update)
            seconds = {"prior_seconds": plain.seconds[WARM_UP:], "seconds": measured_one.seconds[WARM_UP:]}
            rows.append({"name": name, "time_ratios": ratios, **seconds})
    return rows


def encode(path: Path, seed: int, settings: Settings) -> None:
    """Write an H.264 clip with x264's own settings.

    A window wanders over a picture, with a cut every few seconds and a camera's grain, without which the file would be
    much smaller than web videos of this size, and decode faster than they do.
    """
    rng = np.random.default_rng(seed)
    height, width = settings.height, settings.width
    grain = rng.normal(0, GRAIN, (2 * height, 2 * width, 3))
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=settings.rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(settings.seconds * settings.rate):
            moment = number % (SCENE * settings.rate) / (SCENE * settings.rate)
            if moment == 0:
                scene, direction = _scene(rng, 2 * height, 2 * width), rng.uniform(0.1, 0.9, (2, 2))
            across = direction[0] + (direction[1] - direction[0]) * moment
            top, left = int(across[0] * height), int(across[1] * width)
            up, aside = rng.integers(height), rng.integers(width)
            noise = grain[up : up + height, aside : aside + width]
            frame = (scene[top : top + height, left : left + width] + noise).clip(0, 255).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def _scene(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Noise at several scales, the coarse the strongest, as in pictures of the world: (height, width, 3) uint8."""
    total = np.zeros((height, width, 3))
    for cells in (4, 16, 64, 256):
        noise = rng.integers(0, 256, (cells * height // width + 1, cells, 3), dtype=np.uint8)
        total += np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)) / cells**0.5
    return (255 * (total - total.min()) / np.ptp(total)).astype(np.uint8)

"""Frames of a video file: which ones to keep, and two backends that decode exactly those.

    read_frames("video7010.mp4", 12, frames_per_second=1.0, size=224)  # CLIP4Clip: (T <= 12, 224, 224, 3) uint8

A file is opened in the calling process and closed before the call returns: a decoder that is open when a data loader
forks is broken in its workers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import islice
from os import PathLike
from typing import cast

import av
import numpy as np
from PIL import Image

from retrieval.video.timeline import (
    Timeline,
    VideoError,
    decode,
    decode_only,
    open_video,
    orientation,
    timeline,
    video_stream,
)

__all__ = ["BACKENDS", "RESIZING", "SLICINGS", "VideoError", "frame_indices", "read_frames", "resize_and_crop"]

SLICINGS = ("head", "tail", "uniform")
RESIZING = ("pillow", "decoder")


def read_frames(
    path: str | PathLike[str],
    count: int,
    *,
    slicing: str = "uniform",
    frames_per_second: float | None = None,
    size: int | None = None,
    resizing: str = "pillow",
    backend: str = "decord",
) -> np.ndarray:
    """Decode at most `count` frames of a video.

    Args:
        path: any container that FFmpeg reads.
        count: the most frames to return, at least 1.
        slicing: which frames to keep when there are more, one of `SLICINGS`; see `frame_indices`.
        frames_per_second: sample at this rate first (CLIP4Clip: 1.0), or None to choose among all frames.
        size: side in pixels of the square to resize (short side, bicubic) and centre-crop to; None leaves frames as is.
        resizing: "pillow", which is CLIP's own preprocessing, on whole frames; or "decoder", FFmpeg's bicubic filter
            while it decodes, so that no frame is ever larger than it needs to be: faster, the larger the video, but
            with slightly other pixels, which also depend on the backend.
        backend: one of `BACKENDS`. A file that it cannot read exactly goes to PyAV.

    Returns:
        (T, H, W, 3) uint8 RGB frames in order of presentation, turned as players show them, 1 <= T <= count.

    Raises:
        VideoError: the file is missing, empty, truncated, damaged, or not a video.
        ValueError: an option is unknown or out of range.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; choose from {', '.join(BACKENDS)}")
    if resizing not in RESIZING:
        raise ValueError(f"unknown resizing {resizing!r}; choose from {', '.join(RESIZING)}")
    line = timeline(path)
    if frames_per_second is not None and line.fps <= 0:
        raise VideoError(path, "it states no frame rate; read it with frames_per_second=None")
    seconds = None if frames_per_second is None else line.seconds
    indices = frame_indices(len(line.times), line.fps, count, slicing, frames_per_second, seconds=seconds)
    short = size if resizing == "decoder" else None
    try:
        frames = BACKENDS[backend](path, indices, line, short)
    except VideoError:
        if backend == "pyav":
            raise
        frames = pyav_frames(path, indices, line, short)
    return frames if size is None else np.stack([resize_and_crop(frame, size) for frame in frames])


def frame_indices(
    total: int,
    fps: float,
    count: int,
    slicing: str = "uniform",
    frames_per_second: float | None = None,
    *,
    seconds: np.ndarray | None = None,
) -> np.ndarray:
    """Choose at most `count` of `total` frames by CLIP4Clip's rule (Luo et al. 2021, https://arxiv.org/abs/2104.08860).

    The candidates are the frames that a player shows at 0, 1, 2, ... times 1 / `frames_per_second` seconds after the
    first, each once, or every frame if that is None. Of more than `count` candidates keep the first ("head"), the last
    ("tail") or evenly spaced ones, `linspace(0, n - 1, count)` rounded down ("uniform": of 13 candidates, 12 are 0 to
    10 and 12). The authors' code rounds `fps` down first and so drifts, at 29.97 fps by a second in half a minute; here
    candidates stand at the exact times.

    Args:
        total: frames of the video.
        fps: its average rate; the last frame is taken to last 1 / `fps` seconds.
        count: the most frames to choose.
        slicing: one of `SLICINGS`.
        frames_per_second: the rate of the candidates, or None.
        seconds: (total,) since the first frame, ascending; None for a constant rate.

    Returns:
        (T,) int64, strictly ascending, T <= count.
    """
    if total < 1 or count < 1:
        raise ValueError(f"cannot choose {count} of {total} frames; both must be at least 1")
    if slicing not in SLICINGS:
        raise ValueError(f"unknown slicing {slicing!r}; choose from {', '.join(SLICINGS)}")
    if frames_per_second is None:
        candidates = np.arange(total)
    elif frames_per_second > 0 and fps > 0:
        begins = np.arange(total) / fps if seconds is None else seconds
        bounds = np.append(begins, begins[-1] + 1 / fps) - 1e-6 / fps  # a frame may begin just after its time
        # how many times lie before each bound; a frame is a candidate if one lies between its own and the next
        candidates = np.flatnonzero(np.diff(np.ceil(bounds * frames_per_second)) > 0)
    else:
        raise ValueError(f"cannot sample {frames_per_second} frames a second from {fps}; both must be positive")
    if len(candidates) <= count:
        return candidates
    if slicing == "uniform":
        return candidates[np.linspace(0, len(candidates) - 1, count, dtype=np.int64)]
    return candidates[:count] if slicing == "head" else candidates[-count:]


def decord_frames(
    path: str | PathLike[str], indices: np.ndarray, line: Timeline, short: int | None = None
) -> np.ndarray:
    """Decode frames `indices` with decord, (T, H, W, 3) uint8, at the file's own size or scaled to a short side.

    decord seeks, which saves decoding: 12 frames of a 20 s video in 200 ms, all of them in 850 ms. But decord
    0.6.0 seeks to the n-th packet and calls what it decodes next the n-th frame. In an open group of pictures, frames
    shown before the key frame are stored after it, so the two numbers differ and it returns wrong frames without a
    word. Its own timestamps are sorted and cannot tell; the order of the packets can, so such files are refused. So are
    those that are not plain: of 10 bits a channel it makes other colours than FFmpeg.

    Raises:
        VideoError: decord is not installed, fails, or could return wrong frames.
    """
    if not line.seekable:
        raise VideoError(path, "decord could return wrong frames: open groups of pictures, edit list, or not an MP4")
    if not line.plain:
        raise VideoError(path, "decord could return wrong pixels: over 8 bits a channel, or to be turned or mirrored")
    try:
        import decord
    except ImportError as error:
        warnings.warn("decord is not installed: videos are read with PyAV instead", stacklevel=3)
        raise VideoError(path, "decord is not installed") from error
    decord.logging.set_level(decord.logging.QUIET)  # what it would say on stderr is in the VideoError
    try:
        # The smallest tolerance: by default decord puts a neighbour in place of each frame that it cannot decode.
        width, height = (-1, -1) if short is None else _scaled(*_size(path), short)
        reader = decord.VideoReader(str(path), width=width, height=height, num_threads=1, fault_tol=1e-6)
        total, frames = len(reader), reader.get_batch(indices).asnumpy()
    except Exception as error:  # its errors share no other base: RuntimeError, DECORDError(Exception), AssertionError
        raise VideoError(path, f"decord failed: {type(error).__name__} {error}".strip()) from error
    if total != len(line.times):
        raise VideoError(path, f"decord counts {total} frames, the container {len(line.times)}")
    return frames


def pyav_frames(path: str | PathLike[str], indices: np.ndarray, line: Timeline, short: int | None = None) -> np.ndarray:
    """Decode frames `indices` with PyAV, (T, H, W, 3) uint8, at the file's own size or scaled to a short side.

    Where `line` allows it, from the key frame before each wanted frame on, and of the rest only what they refer to;
    else in order from the start.

    Raises:
        VideoError: a wanted frame is missing, damaged, or not shown when the container says.
    """
    try:
        frames = (_sought if line.seekable else _in_order)(path, indices, line, short)
    except (av.FFmpegError, OSError) as error:  # in opening, seeking or converting; `decode` tells of its own
        raise VideoError(path, f"FFmpeg failed: {type(error).__name__} {error}".strip()) from error
    if len(frames) < len(indices):
        raise VideoError(path, f"only {len(frames)} of {len(indices)} frames up to {indices[-1]} can be decoded")
    return np.stack(frames)


def _sought(path: str | PathLike[str], indices: np.ndarray, line: Timeline, short: int | None) -> list[np.ndarray]:
    groups = np.searchsorted(line.keys, indices, side="right") - 1
    kept: dict[int, np.ndarray] = {}
    with open_video(path) as container:
        stream = video_stream(path, container)
        for group in np.unique(groups):
            container.seek(cast(int, line.times[line.keys[group]]), stream=stream)
            wanted = [cast(int, line.times[index]) for index in indices[groups == group]]
            for frame in decode_only(path, container, stream, wanted):
                kept[cast(int, frame.pts)] = _rgb(frame, short)
    return [kept[time] for time in sorted(kept)]


def _in_order(path: str | PathLike[str], indices: np.ndarray, line: Timeline, short: int | None) -> list[np.ndarray]:
    kept: list[np.ndarray] = []
    wanted, last = set(indices.tolist()), int(indices[-1])
    with open_video(path) as container:
        frames = decode(path, container, video_stream(path, container))
        for position, frame in enumerate(islice(frames, last + 1)):
            if frame.pts != line.times[position]:
                raise VideoError(path, f"frame {position} of {len(line.times)} is missing")
            if position in wanted:
                kept.append(_rgb(frame, short))
    return kept


def _rgb(frame: av.VideoFrame, short: int | None) -> np.ndarray:
    if short is None:
        return _upright(frame.to_ndarray(format="rgb24"), frame)
    width, height = _scaled(frame.width, frame.height, short)
    return _upright(frame.to_ndarray(format="rgb24", width=width, height=height, interpolation="BICUBIC"), frame)


def _upright(pixels: np.ndarray, frame: av.VideoFrame) -> np.ndarray:
    """(H, W, 3) turned and mirrored by the frame's display matrix, to the nearest quarter."""
    a, b, c, d = orientation(frame) or (1, 0, 0, 1)
    across, down = a, d
    if abs(b) > abs(a):
        pixels, across, down = pixels.swapaxes(0, 1), c, b
    return np.ascontiguousarray(pixels[:: -1 if down < 0 else 1, :: -1 if across < 0 else 1])


def _size(path: str | PathLike[str]) -> tuple[int, int]:
    with open_video(path) as container:
        stream = video_stream(path, container)
        return stream.width, stream.height


def _scaled(width: int, height: int, short: int) -> tuple[int, int]:
    """(width, height) with a short side of `short`, the long one rounded down as torchvision does."""
    return short * width // min(width, height), short * height // min(width, height)


BACKENDS: dict[str, Callable[[str | PathLike[str], np.ndarray, Timeline, int | None], np.ndarray]] = {
    "decord": decord_frames,
    "pyav": pyav_frames,
}


def resize_and_crop(frame: np.ndarray, size: int) -> np.ndarray:
    """Resize (H, W, 3) uint8 to a short side of `size` px (bicubic, antialiased), crop the centre: (size, size, 3)."""
    height, width = frame.shape[:2]
    short = min(height, width)
    image = Image.fromarray(frame)
    if short != size:
        image = image.resize(_scaled(width, height, size), Image.Resampling.BICUBIC)
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return np.asarray(image.crop((left, top, left + size, top + size)))

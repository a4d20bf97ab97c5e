"""Which frames a video file holds, and whether a decoder may seek among them.

    timeline("video7010.mp4")      # Timeline(times=(0, 512, 1024, ...), fps=25.0, seekable=True, ...)

Frames are chosen from the timeline before anything is decoded, so every backend returns the same ones.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import Any, cast

import av
import numpy as np


class VideoError(Exception):
    """A video file that cannot be read as asked: `path` and, in words, the `reason`."""

    def __init__(self, path: str | PathLike[str], reason: str) -> None:
        super().__init__(str(path), reason)  # both are kept in args, so that the error survives pickling
        self.path, self.reason = Path(path), reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass(frozen=True)
class Timeline:
    """The frames of a file.

    Attributes:
        times: presentation time of each frame that can be shown, in order of presentation, in units of the stream.
        fps: average frames per second, 0.0 if the container does not say.
        seekable: whether the n-th packet of each key frame is the n-th frame shown, and a seek to it finds it.
        keys: which frames are key frames, ascending; empty where it is not seekable.
        unit: of the times, in seconds.
        plain: whether frames of an MP4 have 8 bits a channel and are shown as they are stored, neither turned nor
            mirrored; what a decoder makes of others is its own affair.
    """

    times: tuple[int | None, ...]
    fps: float
    seekable: bool
    keys: tuple[int, ...] = ()
    plain: bool = True
    unit: float = 0.0

    @property
    def seconds(self) -> np.ndarray:
        """(n,) float64 >= 0, ascending: when each frame is shown, since the first.

        Where the times say no more than a constant rate does, to within one unit, it is n / fps: the file has rounded.
        """
        even = np.arange(len(self.times)) / self.fps
        if None in self.times:
            return even
        ticks = np.array(self.times, np.int64)
        stored = np.maximum.accumulate(ticks - ticks[0]) * self.unit
        return even if np.abs(stored - even).max() <= self.unit else stored


def timeline(path: str | PathLike[str]) -> Timeline:
    """List the frames of a video: from the index of an MP4 file (about 10 us a frame), of others by decoding them all.

    Only MP4 says exactly which frames it holds. AVI has no presentation times, WebM has packets that are never shown,
    and an MPEG program stream has no index: decord was seen to return wrong frames of AVI and MPEG after a seek.

    Raises:
        VideoError: the file is missing, empty, truncated, damaged, or not a video.
    """
    if not Path(path).is_file():
        raise VideoError(path, "there is no such file")
    if (size := Path(path).stat().st_size) == 0:
        raise VideoError(path, "the file is empty")
    try:
        with open_video(path) as container:
            stream = video_stream(path, container)
            fps, unit = float(stream.average_rate or 0), float(stream.time_base or 0)
            if "mp4" not in container.format.name:
                times = tuple(frame.pts for frame in decode(path, container, stream))
                return _checked(path, Timeline(times, fps, seekable=False, unit=unit))
            indexed = [entry.pos + entry.size for entry in stream.index_entries]
            packets = [packet for packet in container.demux(stream) if packet.size]
            plain = _is_plain(stream, packets)
    except av.FFmpegError as error:
        raise VideoError(path, f"FFmpeg cannot read it ({error.strerror})") from error
    if max(indexed, default=0) > size:
        raise VideoError(path, f"it is truncated: {size} bytes, but its index names frames up to byte {max(indexed)}")
    line = _from_packets(packets, fps, whole_index=len(indexed) == len(packets))
    return _checked(path, replace(line, plain=plain, unit=unit))


def open_video(path: str | PathLike[str]) -> av.container.InputContainer:
    """A file to read; a title or comment that is not UTF-8, which nobody asks for, does not end in an error."""
    return av.open(str(path), metadata_errors="replace")


def video_stream(path: str | PathLike[str], container: av.container.InputContainer) -> av.VideoStream:
    """The main video stream, to be decoded in one thread; VideoError if there is none."""
    stream = container.streams.best("video")
    if not isinstance(stream, av.VideoStream) or stream.disposition & av.stream.Disposition.attached_pic:
        # the second: the cover of a music file
        raise VideoError(path, "it holds no video stream")
    stream.thread_count = 1  # FFmpeg's own threads can deadlock beside torch's
    return stream


def decode(
    path: str | PathLike[str], container: av.container.InputContainer, stream: av.VideoStream
) -> Iterator[av.VideoFrame]:
    """Every frame in order of presentation; VideoError at the first one that is damaged."""
    start: int | None = None
    position = 0
    try:
        for packet in container.demux(stream):
            if start is None and packet.is_keyframe:
                start = packet.pts
            if start is not None and packet.pts is not None and packet.pts < start:
                continue  # a cut went through its group of pictures: it refers to frames that the file does not hold
            for frame in packet.decode():
                if frame.is_corrupt:
                    raise VideoError(path, f"frame {position} is damaged")
                yield frame
                position += 1
    except av.FFmpegError as error:
        raise VideoError(path, f"FFmpeg cannot decode frame {position} ({error.strerror})") from error


def decode_only(
    path: str | PathLike[str], container: av.container.InputContainer, stream: av.VideoStream, times: Collection[int]
) -> Iterator[av.VideoFrame]:
    """The frames shown at `times`, all of the group of pictures at whose key frame the container stands.

    A frame that is not wanted and that no other refers to is skipped by the decoder, which saves a third to a half of
    the work; the others are the same bits with and without it.

    Raises:
        VideoError: a frame is damaged.
    """
    context, waiting = stream.codec_context, set(times)
    try:
        for packet in container.demux(stream):
            context.skip_frame = "DEFAULT" if packet.pts in waiting else "NONREF"
            waiting.discard(cast(int, packet.pts))
            frames = packet.decode()
            if not waiting:  # what comes later refers to these, not these to it
                frames += context.decode(None)
            for frame in frames:
                if frame.pts in times:
                    if frame.is_corrupt:
                        raise VideoError(path, f"the frame at {frame.time:.2f} s is damaged")
                    yield frame
            if not waiting:
                return
    except av.FFmpegError as error:
        raise VideoError(path, f"FFmpeg cannot decode a frame that it needs ({error.strerror})") from error


def orientation(frame: av.VideoFrame) -> tuple[int, int, int, int] | None:
    """(a, b, c, d) of the display matrix: the pixel stored at (x, y) is shown at (ax + cy, bx + dy); None without."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return None
    a, b, _, c, d = np.frombuffer(cast(Any, matrix), np.int32, count=5).tolist()  # 16.16 fixed point
    return a, b, c, d


def _is_plain(stream: av.VideoStream, packets: list[av.Packet]) -> bool:
    form = stream.codec_context.format
    if form is not None and max(component.bits for component in form.components) > 8:
        return False
    with suppress(av.FFmpegError):  # a damaged frame is for those to name who read it
        first = next((packet for packet in packets if packet.is_keyframe), None)
        for frame in [*first.decode(), *stream.codec_context.decode(None)] if first else []:
            a, b, c, d = orientation(cast(av.VideoFrame, frame)) or (1, 0, 0, 1)
            return a > 0 and d > 0 and b == c == 0
    return True


def _from_packets(packets: list[av.Packet], fps: float, whole_index: bool) -> Timeline:
    keys = [packet for packet in packets if packet.is_keyframe]
    if not keys or any(packet.pts is None or packet.dts is None for packet in packets):
        return Timeline((), fps, seekable=False)
    first = cast(int, keys[0].pts)
    times = sorted(cast(int, p.pts) for p in packets if cast(int, p.pts) >= first and not p.is_discard)
    position = {time: n for n, time in enumerate(times)}
    seekable = (
        whole_index
        and len(position) == len(packets)
        and all(position[cast(int, packet.pts)] == n for n, packet in enumerate(packets) if packet.is_keyframe)
        # FFmpeg seeks by decoding time: it takes the last key frame that is not later
        and all(cast(int, key.pts) < cast(int, following.dts) for key, following in pairwise(keys))
    )
    return Timeline(
        tuple(times), fps, seekable, tuple(position[cast(int, key.pts)] for key in keys) if seekable else ()
    )


def _checked(path: str | PathLike[str], line: Timeline) -> Timeline:
    if not line.times:
        raise VideoError(path, "its video stream holds no frame that can be decoded")
    return line

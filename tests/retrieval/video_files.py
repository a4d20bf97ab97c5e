"""Videos for tests: frames that carry their number, in the formats that are about, sound and damaged."""

from __future__ import annotations

import struct
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

SIDE = 64
CLOSED = {"x264-params": "keyint=24:min-keyint=24:scenecut=0:bframes=3"}


def numbered(total: int) -> np.ndarray:
    """Frames that carry their number: bar b is bright where bit b is set."""
    frames = np.full((total, SIDE, SIDE, 3), 40, np.uint8)
    for number in range(total):
        for bit in range(10):
            if number >> bit & 1:
                frames[number, :, 6 * bit : 6 * bit + 6] = (220, 200, 180)
    return frames


def numbers(frames: np.ndarray) -> list[int]:
    return [sum(1 << bit for bit in range(10) if frame[:, 6 * bit + 2 : 6 * bit + 4].mean() > 120) for frame in frames]


def encode(
    path: Path,
    total: int,
    codec: str = "libx264",
    rate: int | Fraction = 24,
    options: dict | None = None,
    pixels: str = "yuv420p",
    **container: str,
) -> Path:
    with av.open(str(path), "w", options=container) as file:
        stream = file.add_stream(codec, rate=rate, options=options or {})
        stream.width, stream.height, stream.pix_fmt = SIDE, SIDE, pixels
        for frame in numbered(total):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())
    return path


def shown_as(content: bytes, matrix: tuple[int, int, int, int]) -> bytes:
    """An MP4 file whose header (a "tkhd" box of version 0) has players turn or mirror the picture: a, b, c, d."""
    a, b, c, d = (value << 16 for value in matrix)
    where = content.index(b"tkhd") + 44
    return content[:where] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + content[where + 36 :]


def scrambled(content: bytes, start: float, stop: float) -> bytes:
    """Noise in place of a part of the coded pictures; the header, behind them, stays sound."""
    first, end = content.index(b"mdat") + 4, content.index(b"moov") - 4
    damaged = bytearray(content)
    where = slice(first + int(start * (end - first)), first + int(stop * (end - first)))
    damaged[where] = np.random.default_rng(0).bytes(len(damaged[where]))
    return bytes(damaged)


def audio_only(path: Path) -> None:
    with av.open(str(path), "w") as file:
        stream = file.add_stream("aac", rate=16000)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 16000
        file.mux(stream.encode(silence))
        file.mux(stream.encode())


def from_clip(change: Callable[[bytes], bytes], **how) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(change(encode(path.with_name("sound.mp4"), 100, **({"options": CLOSED} | how)).read_bytes()))

    return write


def before_last_packets(path: Path) -> None:
    """Cut exactly between two pictures, behind an index that names them all."""
    sound = encode(path.with_name("sound.mp4"), 100, options=CLOSED, movflags="+faststart")
    with av.open(str(sound)) as file:
        positions = [packet.pos for packet in file.demux(video=0) if packet.size]
    path.write_bytes(sound.read_bytes()[: positions[60]])


BAD_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "no such file"),
    "folder": (Path.mkdir, "no such file"),
    "empty": (lambda path: path.write_bytes(b""), "empty"),
    "text": (lambda path: path.write_text("hello\n" * 500), "FFmpeg cannot read it"),
    "nothing but NUL": (lambda path: path.write_bytes(bytes(5000)), "FFmpeg cannot read it"),
    "audio only": (audio_only, "no video stream"),
    "truncated, index lost": (from_clip(lambda content: content[: len(content) // 2]), "FFmpeg cannot read it"),
    "truncated": (from_clip(lambda content: content[: len(content) * 2 // 3], movflags="+faststart"), "truncated"),
    "truncated between frames": (before_last_packets, "truncated"),
    "scrambled": (from_clip(lambda content: scrambled(content, 0, 1)), "no frame that can be decoded"),
    "scrambled, mpeg4": (
        from_clip(lambda content: scrambled(content, 0, 1), codec="mpeg4", options={}),
        "cannot decode",
    ),
    "second half scrambled": (from_clip(lambda content: scrambled(content, 0.5, 1)), "cannot decode|damaged"),
}

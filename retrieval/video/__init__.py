"""Frames of video files: which ones to keep, decoders, and a cache so that each file is decoded once.

`frames` reads a file through decord or PyAV, `timeline` says what it holds, `reading` is how a data set reads its
files, `cache` what was read, `cache_writer` and `timed` how that is written by processes that may not hang.
"""

from __future__ import annotations

from retrieval.video.frames import BACKENDS, SLICINGS, frame_indices, read_frames, resize_and_crop
from retrieval.video.timeline import VideoError

__all__ = ["BACKENDS", "SLICINGS", "VideoError", "frame_indices", "read_frames", "resize_and_crop"]

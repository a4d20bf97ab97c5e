"""CLIP4Clip: a CLIP over the frames of a clip, its four heads, and CLIPs from files of every published form."""

from __future__ import annotations

from retrieval.clip4clip.frame_batch import normalise_frames
from retrieval.clip4clip.model import CLIP4Clip

__all__ = ["CLIP4Clip", "normalise_frames"]

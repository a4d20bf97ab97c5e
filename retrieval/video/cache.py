"""Decoded frames of a list of clips on disk, so that a video is decoded once and not in every epoch.

Files of a cache called ``test`` that was written with `Reading` R, in ``<folder>/<R.key>/``:

- ``test.npy``: (n, T, H, W, 3) uint8, memory-mapped; a clip with fewer than T frames leaves the rest of its row zero.
  The file is sparse: a clip without frames takes no room.
- ``test.items.jsonl``: one line for each clip that is done, appended after its frames are on the disk: its number of
  frames or why it has none, the size of its video in bytes, and the video's SHA-256 if it was read to the end.
- ``test.json``: R and the clips in the order of the rows.
- ``test.unreadable.csv``: for people, the clips without frames and why.

`retrieval.video.cache_writer` writes them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from retrieval.video.reading import Reading

FORMAT = 1
SHOWN = 10  # clips without frames that a message names


@dataclass(frozen=True)
class Item:
    """One clip of a cache.

    Attributes:
        frames: how many of its row's frames are real.
        reason: why there are none; "" where there are some.
        bytes: size of the video that they come from, 0 where there was no file.
        sha256: of that video, as hexadecimal digits; "" where there was no file or reading it did not come to an end.
    """

    frames: int
    reason: str = ""
    bytes: int = 0
    sha256: str = ""


@dataclass(frozen=True)
class CacheFiles:
    """Where the files of a cache are.

    Args:
        folder: of all caches of a data set.
        name: of the list of clips.
        reading: how their frames are read.
    """

    folder: Path
    name: str
    reading: Reading

    def __post_init__(self) -> None:
        if self.reading.size is None:
            raise ValueError("a frame cache needs frames of one size; give size, in pixels")

    def path(self, ending: str) -> Path:
        return self.folder / self.reading.key / f"{self.name}{ending}"

    @property
    def pixels(self) -> Path:
        return self.path(".npy")

    @property
    def description(self) -> Path:
        return self.path(".json")

    @property
    def laid_out(self) -> bool:
        """Whether there is a cache, complete or not: without its frames, a description describes nothing."""
        return self.description.is_file() and self.pixels.is_file()

    @property
    def journal(self) -> Path:
        return self.path(".items.jsonl")

    @property
    def report(self) -> Path:
        return self.path(".unreadable.csv")

    def shape(self, clips: int) -> tuple[int, ...]:
        size = self.reading.size or 0
        return (clips, self.reading.frames, size, size, 3)


class FrameCache:
    """A cache to read from, complete or not; it holds what was done when it was opened.

    Args:
        files: where it is.

    Attributes:
        rows: clip -> row of the file, for all clips.
        items: clip -> `Item`, for those that are done.

    Raises:
        FileNotFoundError: there is no such cache.
        ValueError: it was written with another `Reading`, or is damaged.
    """

    def __init__(self, files: CacheFiles) -> None:
        self.files = files
        if not files.laid_out:
            raise FileNotFoundError(f"there is no frame cache of {files.description} and {files.pixels}")
        described = json.loads(files.description.read_text(encoding="utf-8"))
        expected = description(files.reading, described.get("clips", []))
        if described != expected:
            found = {key: described.get(key) for key in ("format", "reading")}
            raise ValueError(
                f"{files.description} was written with {found}, expected format {FORMAT} and {expected['reading']}; "
                f"delete {files.description.parent} and run scripts/prepare_data.py again"
            )
        self.rows = {clip: row for row, clip in enumerate(described["clips"])}
        self.items = {clip: item for clip, item in read_journal(files.journal).items() if clip in self.rows}

    @classmethod
    def find(cls, files: CacheFiles) -> FrameCache | None:
        """The cache if there is one."""
        return cls(files) if files.laid_out else None

    def __contains__(self, clip: str) -> bool:
        return clip in self.items

    def frames(self, clip: str) -> np.ndarray:
        """(T, H, W, 3) uint8, a copy; T = 0 for a clip that could not be read. KeyError for one that is not done."""
        return np.array(self._pixels[self.rows[clip], : self.items[clip].frames])

    @property
    def unreadable(self) -> dict[str, str]:
        """Clip -> why it has no frames."""
        return {clip: item.reason for clip, item in self.items.items() if not item.frames}

    def summary(self) -> str:
        """One line: how many clips there are, are done, and have no frames."""
        text = f"{self.files.name}: {len(self.rows) - len(self.unreadable):,} of {len(self.rows):,} videos have frames"
        if waiting := len(self.rows) - len(self.items):
            text += f", {waiting:,} are not done yet"
        if self.unreadable:
            text += f", {len(self.unreadable):,} cannot be read: see {self.files.report}"
        return text

    @cached_property
    def _pixels(self) -> np.ndarray:
        pixels = np.load(self.files.pixels, mmap_mode="r", allow_pickle=False)
        if pixels.shape != self.files.shape(len(self.rows)) or pixels.dtype != np.uint8:
            raise ValueError(
                f"{self.files.pixels} holds {pixels.dtype} {pixels.shape}, expected uint8 "
                f"{self.files.shape(len(self.rows))}; delete {self.files.description} and prepare the data again"
            )
        return pixels

    def __getstate__(self) -> dict[str, Any]:
        """Without the mapped file: pickling it for the process of a data loader would copy all frames."""
        return {name: value for name, value in self.__dict__.items() if name != "_pixels"}


def description(reading: Reading, clips: list[str]) -> dict[str, Any]:
    """The content of a cache's JSON file."""
    return {"format": FORMAT, "reading": reading.options, "clips": clips}


def read_journal(path: Path) -> dict[str, Item]:
    """Clip -> `Item` of a journal; of several lines on one clip the last counts, one without frames takes it back."""
    items: dict[str, Item] = {}
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []  # after the last newline: cut by a kill
    for line in lines:
        record = json.loads(line)
        clip = record.pop("clip")
        items.pop(clip, None)
        if record:
            items[clip] = Item(**record)
    return items


def named(reasons: Mapping[str, str]) -> str:
    """For a message: the first clips that cannot be read, with the reason."""
    shown = "; ".join(f"{clip}: {reason}" for clip, reason in list(reasons.items())[:SHOWN])
    return shown + (f"; and {len(reasons) - SHOWN} more" if len(reasons) > SHOWN else "")

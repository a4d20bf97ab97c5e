"""Write a frame cache: decode many videos in parallel, each within a time limit, and go on where a killed call ended.

    files = CacheFiles(root / "msrvtt" / "frames", "test", Reading(frames=12, frames_per_second=1.0, size=224))
    cache = write_cache(files, {"video7020": root / "msrvtt/videos/video7020.mp4", ...})

What cannot be read is not an error here: the cache holds the reason in place of the frames.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import TracebackType

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from retrieval.locking import only_writer
from retrieval.video.cache import CacheFiles, FrameCache, Item, description, read_journal
from retrieval.video.frames import VideoError
from retrieval.video.reading import Reading
from retrieval.video.timed import Failure, timed_map

BATCH = 32  # clips between two commits to the disk: what a kill can cost
TIME_LIMIT = 60.0  # seconds for one file; one of half a minute takes a tenth of a second


@dataclass(frozen=True)
class Clip:
    """What reading a file gave: frames (T, H, W, 3) uint8 and its `Item`."""

    frames: np.ndarray
    item: Item


def write_cache(
    files: CacheFiles, videos: Mapping[str, Path], *, workers: int | None = None, time_limit: float = TIME_LIMIT
) -> FrameCache:
    """Write what a cache does not hold yet; nothing is decoded twice.

    A clip that could not be read is tried again, and one whose video has another size than before is read anew. A
    second process that is asked for the same cache waits for the first.

    Args:
        files: where the cache is or will be, and how frames are read.
        videos: clip -> its file, in the order of the rows.
        workers: processes; None for one a core. 0 decodes in this process, without a time limit.
        time_limit: seconds for one file; one that takes longer counts as unreadable.

    Raises:
        ValueError: the cache is there for other clips, or the disk has not enough room.
    """
    files.pixels.parent.mkdir(parents=True, exist_ok=True)
    with only_writer(files.path(".lock")):
        _begin(files, list(videos))
        done = read_journal(files.journal)
        todo = [clip for clip, path in videos.items() if not _is_current(done.get(clip), path)]
        with (
            _Writer(files, {clip: row for row, clip in enumerate(videos)}) as writer,
            tqdm(
                total=len(videos), initial=len(videos) - len(todo), desc=files.name, unit="clip", disable=not todo
            ) as bar,
        ):
            writer.forget([clip for clip in todo if clip in done])
            unreadable = 0
            for clip, read in _read([(clip, videos[clip]) for clip in todo], files.reading, workers, time_limit):
                writer.put(clip, read)
                unreadable += not read.item.frames
                bar.set_postfix(unreadable=unreadable, refresh=False)
                bar.update()
        cache = FrameCache(files)
        reasons = cache.unreadable
        table = pd.DataFrame({"clip": list(reasons), "video": map(str, map(videos.get, reasons))})
        table.assign(reason=list(reasons.values())).to_csv(files.report, index=False)
    return cache


def read_clip(path: Path, reading: Reading) -> Clip:
    """The frames of a file, or none and the reason."""
    try:
        frames, reason = reading.of(path), ""
    except VideoError as error:
        frames, reason = reading.none(), error.reason
    return Clip(frames, Item(len(frames), reason, *size_and_digest(path)))


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Writer:
    """The open files of a cache. An item is journaled after its frames are on the disk, never before."""

    def __init__(self, files: CacheFiles, rows: Mapping[str, int]) -> None:
        self.rows = rows
        mapped = np.load(files.pixels, mmap_mode="r", allow_pickle=False)
        self.start, self.stride = mapped.offset, int(np.prod(mapped.shape[1:]))
        # written as a file, not through the map, where a full disk ends the process without an exception
        self.pixels = files.pixels.open("r+b")
        self.journal = files.journal.open("a+b")
        self.journal.seek(0)
        whole = self.journal.read().rfind(b"\n") + 1
        self.journal.truncate(whole)  # a line that a kill cut in two
        self.waiting: list[bytes] = []

    def __enter__(self) -> _Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.commit()
        finally:
            self.pixels.close()
            self.journal.close()

    def forget(self, clips: Sequence[str]) -> None:
        """Take clips back before their rows are written again."""
        self.waiting += [_line(clip=clip) for clip in clips]
        self.commit()

    def put(self, clip: str, read: Clip) -> None:
        if len(read.frames):
            self.pixels.seek(self.start + self.rows[clip] * self.stride)
            self.pixels.write(np.ascontiguousarray(read.frames).data)
        self.waiting.append(_line(clip=clip, **asdict(read.item)))
        if len(self.waiting) >= BATCH:
            self.commit()

    def commit(self) -> None:
        for file, lines in ((self.pixels, []), (self.journal, self.waiting)):
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        self.waiting = []


def _line(**record: object) -> bytes:
    return json.dumps(record).encode() + b"\n"


def _read(
    todo: Sequence[tuple[str, Path]], reading: Reading, workers: int | None, time_limit: float
) -> Iterator[tuple[str, Clip]]:
    workers = cores() if workers is None else workers
    paths, function = [path for _, path in todo], partial(read_clip, reading=reading)
    for position, read in timed_map(function, paths, workers=workers, seconds=time_limit):
        clip, path = todo[position]
        if isinstance(read, Failure):
            # without a digest: this process has no time limit, and the file may stall again
            read = Clip(reading.none(), Item(0, read.reason, path.stat().st_size if path.is_file() else 0))
        yield clip, read


def _begin(files: CacheFiles, clips: list[str]) -> None:
    """Lay out an empty cache, or check that the one that is there is for these clips."""
    wanted = description(files.reading, clips)
    if files.laid_out:
        if FrameCache(files).rows != {clip: row for row, clip in enumerate(clips)}:
            raise ValueError(
                f"{files.description} was written for other clips than the {len(clips):,} that the data set has now; "
                f"delete {files.name}.* in {files.description.parent} and prepare the data again"
            )
        return
    needed, free = int(np.prod(files.shape(len(clips)))), shutil.disk_usage(files.pixels.parent).free
    if needed > free:
        raise ValueError(
            f"{files.pixels} needs up to {needed / 1e9:.1f} GB and the disk has {free / 1e9:.1f} GB; make room, link "
            f"{files.folder} to a larger disk, or keep fewer or smaller frames (data.frames, data.size)"
        )
    for left in (files.description, files.journal):  # of a cache whose frames were deleted
        left.unlink(missing_ok=True)
    np.lib.format.open_memmap(files.pixels, mode="w+", dtype=np.uint8, shape=files.shape(len(clips)))
    partial_file = files.path(".json.partial")
    partial_file.write_text(json.dumps(wanted), encoding="utf-8")
    os.replace(partial_file, files.description)  # last: where it is, the cache is laid out


def _is_current(item: Item | None, path: Path) -> bool:
    """Whether a clip has its frames, of the file that is there (or was, where it has been removed since)."""
    if item is None or not item.frames:
        return False
    return not path.is_file() or path.stat().st_size == item.bytes


def size_and_digest(path: Path) -> tuple[int, str]:
    if not path.is_file():
        return 0, ""
    with path.open("rb") as file:
        return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()

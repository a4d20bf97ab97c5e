"""What the files of MSR-VTT hold, before a cache is written and a training starts."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from retrieval.data.msrvtt_options import MSRVTTOptions
from retrieval.data.msrvtt_tables import (
    CLIP,
    DATA_FILE,
    PUBLISHED,
    TEST_FILE,
    carve_validation,
    check_count,
    check_files,
    find_videos,
    train_file,
)
from retrieval.data.verification import SplitCount, Verification, pretrained_note
from retrieval.video.cache import CacheFiles, FrameCache
from retrieval.video.cache_writer import TIME_LIMIT, cores
from retrieval.video.reading import Reading, problem_of
from retrieval.video.timed import Failure, timed_map


def verify_msrvtt(
    folder: Path,
    *,
    decode: bool = False,
    workers: int | None = None,
    time_limit: float = TIME_LIMIT,
    **options: Any,
) -> Verification:
    """Counts of the two lists beside the published ones, and each video that is missing or cannot be read.

    Args:
        folder: of the annotation files and of ``videos/``.
        decode: whether to decode the frames that are kept, instead of reading each file's index.
        workers: processes, None for one a core; 0 opens in this one, without a time limit.
        time_limit: seconds for one file.
        options: of `MSRVTTOptions`; `max_unreadable` is for training, here every unreadable video is a problem.

    Raises:
        FileNotFoundError: the annotation files or the folder of videos are not there.
        ValueError: an annotation file is not of its form, or a training video is also in the test.
    """
    chosen = MSRVTTOptions(**options)
    check_files(folder, (train_file(chosen.train), TEST_FILE, DATA_FILE, "videos"))
    lists = {name: chosen.pairs(folder, name, check_counts=False) for name in (chosen.train_list, "test")}
    splits, problems = [], []
    for name, pairs in lists.items():
        count = (pairs["video_id"].nunique(), len(pairs))
        if chosen.check_counts and (problem := check_count(name, count)):
            problems.append(problem)
        if blank := int((pairs["caption"].str.strip() == "").sum()):
            problems.append(f"{name}: {blank} sentences are empty")
        videos = find_videos(folder / "videos", pairs["video_id"].unique())
        missing = {video: f"there is no {path}" for video, path in videos.items() if not path.is_file()}
        there = {video: path for video, path in videos.items() if video not in missing}
        unreadable = _unreadable(
            name, there, chosen.reading if decode else None, cores() if workers is None else workers, time_limit
        )
        problems += [f"{name}: {video}: {reason}" for video, reason in (missing | unreadable).items()]
        problems += _of_cache(CacheFiles(folder / "frames", name, chosen.reading), videos)
        splits.append(SplitCount(name, *count, len(missing), len(unreadable), PUBLISHED[name]))
    if isinstance(chosen.validation, int) and chosen.validation:
        videos_of_train = lists[chosen.train_list]["video_id"].unique().tolist()
        carved = len(carve_validation(videos_of_train, chosen.validation, chosen.validation_seed))
        splits.insert(1, SplitCount("validation, of these", carved, carved))
    note = pretrained_note("CLIP ViT-B/32, where model=clip4clip_vit_b32 starts,", folder.parent / CLIP)
    return Verification(splits, problems, [note])


def _unreadable(
    label: str, videos: Mapping[str, Path], reading: Reading | None, workers: int, time_limit: float
) -> dict[str, str]:
    found = {}
    names = list(videos)
    calls = timed_map(partial(problem_of, reading=reading), list(videos.values()), workers=workers, seconds=time_limit)
    for position, outcome in tqdm(calls, total=len(names), desc=f"checking {label}", unit="video"):
        if reason := outcome.reason if isinstance(outcome, Failure) else outcome:
            found[names[position]] = reason
    return {name: found[name] for name in names if name in found}


def _of_cache(files: CacheFiles, videos: Mapping[str, Path]) -> list[str]:
    """What is wrong with a frame cache, where there is one."""
    try:
        cache = FrameCache.find(files)
    except ValueError as error:
        return [str(error)]
    if cache is None:
        lost = f"{files.name}: the frame cache has lost its frames, {files.pixels}; prepare it again"
        return [lost] if files.description.is_file() else []
    problems = []
    if cache.rows.keys() != videos.keys():
        problems.append(f"the frame cache {files.description} is for other videos; delete it")
    waiting = cache.rows.keys() - cache.items.keys()
    stale = [
        video
        for video, path in videos.items()
        if video in cache and path.is_file() and path.stat().st_size != cache.items[video].bytes
    ]
    for count, what in ((len(waiting), "are not in it yet"), (len(stale), "have changed since it was written")):
        if count:
            problems.append(f"{files.name}: {count} videos {what}: the frame cache {files.pixels}; prepare it again")
    return problems

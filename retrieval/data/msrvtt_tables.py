"""The annotation files of MSR-VTT as retrieval uses them (1k-A), as they are published.

- ``MSRVTT_train.9k.csv`` and ``MSRVTT_train.7k.csv``: a header and a ``video_id`` ("video0") a line; the second is the
  first part of the data set's own training and validation split, and a subset of the first file.
- ``MSRVTT_data.json``: ``{"sentences": [{"sen_id", "video_id", "caption"}, ...], ...}``, 20 a video.
- ``MSRVTT_JSFUSION_test.csv``: ``key,vid_key,video_id,sentence``, one sentence for each of 1,000 videos.

Four sentences of the test occur for two or three videos (9 rows); they are kept, as in all published results.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pandas as pd

TRAIN = ("9k", "7k")
TEST_FILE = "MSRVTT_JSFUSION_test.csv"
DATA_FILE = "MSRVTT_data.json"
ENDINGS = (".mp4", ".webm", ".mkv", ".avi", ".mov")  # of video files; the first that is there is taken
PUBLISHED = {"train.9k": (9000, 180_000), "train.7k": (7010, 140_200), "test": (1000, 1000)}  # videos, sentences

NEEDED = """MSR-VTT is not in {folder}: {missing} not found.
It cannot be fetched from here. Put these there, under these names:
  MSRVTT_train.9k.csv, MSRVTT_train.7k.csv, MSRVTT_JSFUSION_test.csv, MSRVTT_data.json
      the splits and sentences, from msrvtt_data.zip in the releases of github.com/ArrowLuo/CLIP4Clip
  videos/video0.mp4 ... videos/video9999.mp4, or in folders below videos/
      the clips, from the data set's authors (Xu et al., CVPR 2016); .webm, .mkv, .avi and .mov are found too
To train as published, beside them: OpenAI's ViT-B-32.pt (from github.com/openai/CLIP) as {clip}
Then: python scripts/prepare_data.py data=msrvtt; `verify` tells what is missing."""
CLIP = "ViT-B-32.pt"  # under the root: where conf/model/clip4clip_vit_b32.yaml looks for it


def train_file(train: str) -> str:
    """The name of a training list; ValueError for another than `TRAIN`."""
    if train not in TRAIN:
        raise ValueError(f"train is {train!r}; expected one of {', '.join(TRAIN)}")
    return f"MSRVTT_train.{train}.csv"


def check_files(folder: Path, names: Iterable[str]) -> None:
    """Raise a FileNotFoundError that says what to get, and where to put it, if one is missing."""
    if missing := [name for name in names if not (folder / name).exists()]:
        raise FileNotFoundError(NEEDED.format(folder=folder, missing=", ".join(missing), clip=folder.parent / CLIP))


def training_videos(folder: Path, train: str) -> list[str]:
    """The videos of a training list, in its order."""
    return _table(folder / train_file(train), ["video_id"])["video_id"].tolist()


def read_train(folder: Path, train: str, check_counts: bool) -> pd.DataFrame:
    """video_id, caption and sen_id of every sentence of a training list.

    Raises:
        ValueError: a file is not of its form, the counts are not the published ones, or a video is also in the test.
    """
    videos = training_videos(folder, train)
    pairs = _counted(f"train.{train}", captions_of(folder, videos), check_counts)
    if leaked := set(videos) & set(_table(folder / TEST_FILE, ["video_id"])["video_id"]):
        raise ValueError(f"{len(leaked)} videos of {train_file(train)} are in {TEST_FILE} too, {min(leaked)} for one")
    return pairs


def read_test(folder: Path, check_counts: bool) -> pd.DataFrame:
    """video_id and caption of the test pairs, in the order of the file; ValueError as for `read_train`."""
    table = _table(folder / TEST_FILE, ["video_id", "sentence"])
    pairs = table[["video_id", "sentence"]].rename(columns={"sentence": "caption"})
    return _counted("test", pairs, check_counts)


def captions_of(folder: Path, videos: Sequence[str]) -> pd.DataFrame:
    """video_id, caption and sen_id of every sentence on `videos`, in the order of these, then of the file.

    Raises:
        ValueError: the file is not of this form, a video has no sentence, or a sentence of one is no text.
    """
    path = folder / DATA_FILE
    try:
        table = pd.DataFrame(json.loads(path.read_text(encoding="utf-8"))["sentences"])
        table = table[["video_id", "caption", "sen_id"]].astype({"video_id": str, "sen_id": str})
    except (ValueError, KeyError, TypeError) as error:
        expected = '{"sentences": [{"sen_id": 0, "video_id": "video0", "caption": "..."}, ...]}'
        raise ValueError(
            f"{path} is not of the form {expected} ({type(error).__name__}: {error}); is it complete? Replace it with "
            "the published file"
        ) from None
    position = {video: number for number, video in enumerate(videos)}
    table = table[table["video_id"].isin(set(position))]
    if silent := position.keys() - set(table["video_id"]):
        raise ValueError(f"{path} has no sentence on {len(silent)} videos of the list, {min(silent)} for one")
    _check_text(path, table)
    order = table["video_id"].map(position).argsort(kind="stable")
    return table.iloc[order].reset_index(drop=True)


def carve_validation(videos: Sequence[str], count: int, seed: int) -> list[str]:
    """`count` of the videos, or none, in their order: those whose names have the smallest hashes.

    So the choice depends on the seed and the names alone, not on a library's random numbers.

    Raises:
        ValueError: there would be no video for training.
    """
    if not 0 <= count < len(videos):
        raise ValueError(
            f"validation={count} of {len(videos)} training videos; expected 0 or more, and some to train on"
        )
    chosen = set(sorted(videos, key=lambda video: _hash(seed, video))[:count])
    return [video for video in videos if video in chosen]


def one_caption_each(captions: pd.DataFrame, seed: int) -> pd.DataFrame:
    """One sentence of each video, drawn by hash: pairs of the form that the test split has."""
    hashes = [
        _hash(seed, video, sentence) for video, sentence in zip(captions["video_id"], captions["sen_id"], strict=True)
    ]
    first = captions.assign(hash=hashes).sort_values("hash", kind="stable").drop_duplicates("video_id").index
    return captions.loc[sorted(first)].reset_index(drop=True)


def check_count(name: str, found: tuple[int, int]) -> str | None:
    """What is wrong with the number of videos and sentences of a list of `PUBLISHED`, or None."""
    if found == (published := PUBLISHED[name]):
        return None
    file = TEST_FILE if name == "test" else f"MSRVTT_{name}.csv with {DATA_FILE}"
    return (
        f"{file}: {found[0]:,} videos with {found[1]:,} sentences, published are {published[0]:,} with {published[1]:,}"
    )


def find_videos(folder: Path, videos: Iterable[str]) -> dict[str, Path]:
    """Video -> its file ``<folder>/<video>.<ending>``; for one that is missing, where its .mp4 would be.

    Where none of them lies in the folder itself, the folders below it are searched, as archives unpack into some; links
    to folders are not followed.

    Raises:
        ValueError: two folders below hold one of them.
    """
    found: dict[str, list[Path]] = {video: [] for video in videos}
    for place, _, names in os.walk(folder):  # from the top
        for path in (Path(place, name) for name in names):
            if path.suffix in ENDINGS and path.stem in found:
                found[path.stem].append(path)
        if any(found.values()) and Path(place) == folder:
            break
    for video, paths in found.items():
        if len({path.parent for path in paths}) > 1:
            raise ValueError(
                f"{video} is there {len(paths)} times, as {' and '.join(map(str, sorted(paths)))}; keep the ones that "
                f"are meant, or put them into {folder} itself"
            )
    return {
        video: min(paths, key=lambda path: ENDINGS.index(path.suffix), default=folder / (video + ENDINGS[0]))
        for video, paths in found.items()
    }


def check_found(folder: Path, name: str, videos: Mapping[str, Path]) -> None:
    """Raise a FileNotFoundError that says what was looked for if not one of a list's videos is there."""
    if videos and not any(path.is_file() for path in videos.values()):
        raise FileNotFoundError(
            f"{name}: none of {len(videos):,} videos is in {folder}, or in a folder below it. Looked for "
            f"{next(iter(videos))}{', or '.join((ENDINGS[0], ', '.join(ENDINGS[1:])))}, and so on; put the clips there "
            "under these names"
        )


def _table(path: Path, columns: list[str]) -> pd.DataFrame:
    # keep_default_na: a sentence may be "null" or "none"
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except ValueError as error:  # pandas' own errors and the codec's are such
        raise ValueError(
            f"{path} is no table in UTF-8 with {' and '.join(columns)} in its first line ({type(error).__name__}: "
            f"{error}); is it complete? Replace it with the published file"
        ) from None
    if missing := [column for column in columns if column not in table]:
        raise ValueError(f"{path} has the columns {', '.join(table.columns)}; expected {', '.join(missing)} too")
    names = table["video_id"]
    if (strange := names[[not re.fullmatch(r"[A-Za-z0-9_-]+", name) for name in names]]).size:
        raise ValueError(f"{path}: {strange.iloc[0]!r} is no video_id; expected letters, digits, _ and -, as in video0")
    if (twice := names[names.duplicated()]).size:
        raise ValueError(f"{path} names {twice.size} videos more than once, {twice.iloc[0]} for one")
    return table


def _check_text(path: Path, pairs: pd.DataFrame) -> None:
    """Raise a ValueError if a caption is null, missing or a number, which would become the text 'None' or 'nan'."""
    owners = zip(pairs["video_id"], pairs["caption"], strict=True)
    no_text = [video for video, caption in owners if not isinstance(caption, str)]
    if no_text:
        raise ValueError(
            f"{path}: {len(no_text)} of {len(pairs)} sentences are no text, one on {no_text[0]} among them; write "
            "what is missing, or replace the file with the published one"
        )


def _counted(name: str, pairs: pd.DataFrame, check: bool) -> pd.DataFrame:
    problem = check_count(name, (pairs["video_id"].nunique(), len(pairs)))
    if check and problem:
        raise ValueError(f"{problem}; complete the files, or take them as they are with data.check_counts=false")
    return pairs


def _hash(*parts: object) -> str:
    return hashlib.sha256(" ".join(map(str, parts)).encode()).hexdigest()

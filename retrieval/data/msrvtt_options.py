"""Which videos and sentences of MSR-VTT make a split, and how their frames are read."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path

import pandas as pd

from retrieval.data.msrvtt_tables import carve_validation, one_caption_each, read_test, read_train, train_file
from retrieval.video.reading import Reading


@dataclass(frozen=True, kw_only=True)
class MSRVTTOptions:
    """The settings of `conf/data/msrvtt.yaml`; the defaults are CLIP4Clip's, but for the validation split.

    Args:
        train: the training list, "9k" (1k-A) or "7k".
        validation: how many training videos make the validation split, 0 for none, or "test" to select on the test
            split.
        validation_seed: of the choice of these videos, and of the sentence that each keeps.
        frames, frames_per_second, slicing, size, resizing: how a clip is read; see `Reading`.
        max_unreadable: the largest share of a split's videos that may be missing or damaged.
        decode_every_epoch: whether to start without a complete frame cache, and to decode what it lacks in every epoch,
            where nothing limits the time that a damaged video may take.
        check_counts: whether the files have to hold as many videos and sentences as published.

    Raises:
        ValueError: a value is out of range.
    """

    train: str = "9k"
    validation: int | str = 500
    validation_seed: int = 0
    frames: int = 12
    frames_per_second: float | None = 1.0
    slicing: str = "uniform"
    size: int = 224
    resizing: str = "pillow"
    max_unreadable: float = 0.01
    decode_every_epoch: bool = False
    check_counts: bool = True

    def __post_init__(self) -> None:
        train_file(self.train)
        if self.validation != "test" and not isinstance(self.validation, int):
            raise ValueError(f"validation is {self.validation!r}; expected a number of training videos, or test")
        if not 0 <= self.max_unreadable <= 1:
            raise ValueError(f"max_unreadable is {self.max_unreadable}; expected a share from 0 to 1")
        _ = self.reading

    @property
    def reading(self) -> Reading:
        return Reading(
            frames=self.frames,
            frames_per_second=self.frames_per_second,
            slicing=self.slicing,
            size=self.size,
            resizing=self.resizing,
        )

    @property
    def overrides(self) -> list[str]:
        """The options that differ from the defaults, for a command line: ["data.size=112", "data.frames=8"]."""
        values = ((item.name, getattr(self, item.name), item.default) for item in fields(self))
        changed = [(name, value) for name, value, default in values if value != default]
        return [f"data.{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in changed]

    @property
    def train_list(self) -> str:
        """The name of the training list, also of its frame cache; that of the other list is "test"."""
        return f"train.{self.train}"

    def list_of(self, split: str) -> str:
        """The list that holds the videos of a split."""
        is_test = split == "test" or (split == "validation" and self.validation == "test")
        return "test" if is_test else self.train_list

    def pairs(self, folder: Path, name: str, check_counts: bool | None = None) -> pd.DataFrame:
        """video_id and caption of every sentence of a list; `check_counts` in place of the option if it is given."""
        check = self.check_counts if check_counts is None else check_counts
        return read_test(folder, check) if name == "test" else read_train(folder, self.train, check)

    def split(self, folder: Path, split: str) -> pd.DataFrame:
        """video_id and caption of every sentence of a split: a video's lines follow one another.

        A validation video has one sentence, as a test video has, so that their numbers are of one kind.

        Raises:
            ValueError: an annotation file is not as it should be, or `validation` leaves no video for training.
        """
        pairs = self.pairs(folder, self.list_of(split))
        if self.list_of(split) == "test" or not isinstance(self.validation, int):
            return pairs
        held_out = carve_validation(pairs["video_id"].unique().tolist(), self.validation, self.validation_seed)
        chosen = pairs[pairs["video_id"].isin(set(held_out)) == (split == "validation")]
        return one_caption_each(chosen, self.validation_seed) if split == "validation" else chosen

"""MSR-VTT (Xu et al., CVPR 2016) for text-video retrieval: 10,000 web videos of 10 to 32 s, 20 sentences each.

The protocol is 1k-A (Yu et al., ECCV 2018): train on 9,000 videos (or 7,010), test on 1,000 pairs. The files of
`retrieval.data.msrvtt_tables` come to ``<root>/msrvtt/``, the clips to ``<root>/msrvtt/videos/`` or to folders below.

- Validation: 500 of the training videos with a sentence each, by default; they are not trained on, so that 8,500 are.
  ``validation=0`` trains on all 9,000 and has no validation split. Prior work selects its checkpoints on the test
  split; ``validation="test"`` does that, and a run's record says so.
- "Expanded sentences" of prior code, an item for each sentence, are trainer.pairing=caption here; without them, a
  random sentence of each video in every epoch, is trainer.pairing=image.
- Frames come from the frame cache (`retrieval.video.cache`), which ``prepare`` writes.

A video that cannot be read, because it is missing (a fifth of the addresses are dead), truncated, or audio only, is
never an exception in the middle of a training. Up to a share of `max_unreadable` of a split, it is left out of the
training split with its sentences. Validation and test keep it, as an array without frames, so that they are the same
for everyone. `prepare` finds them, with a limit on the time that each may take, so that no file can hang a training:
without its frame cache, data.decode_every_epoch=true has to be said. What is only found out then, while training, gives
such an array too, with a warning and whatever their share, and nothing limits its time.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from retrieval.data.dataset import SPLITS, fingerprint
from retrieval.data.msrvtt_options import MSRVTTOptions
from retrieval.data.msrvtt_tables import DATA_FILE, TEST_FILE, check_files, check_found, find_videos, train_file
from retrieval.data.msrvtt_verify import verify_msrvtt
from retrieval.data.verification import Verification
from retrieval.video import VideoError
from retrieval.video.cache import CacheFiles, FrameCache, named
from retrieval.video.cache_writer import TIME_LIMIT, size_and_digest, write_cache


class MSRVTT:
    """One split; a `RetrievalDataset` of video frames.

    Args:
        root: folder of all data sets.
        split: "train", "validation" or "test".
        options: of `MSRVTTOptions`.

    Raises:
        FileNotFoundError: files or cached frames are missing; the message says what to get or to run.
        ValueError: an option is out of range, the files are not as published, or too many videos cannot be read.
    """

    name = "msrvtt"

    def __init__(self, root: Path, split: str, **options: Any) -> None:
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}; choose from {', '.join(SPLITS)}")
        self.folder, self.split, self.options = Path(root) / self.name, split, MSRVTTOptions(**options)
        self.reading = self.options.reading
        check_files(self.folder, (train_file(self.options.train), TEST_FILE, DATA_FILE))
        pairs = self.options.split(self.folder, split)
        videos = pairs["video_id"].unique().tolist()

        self.cache = FrameCache.find(CacheFiles(self.folder / "frames", self.options.list_of(split), self.reading))
        if self.cache is None or any(video not in self.cache for video in videos):
            check_files(self.folder, ("videos",))
        self.files = find_videos(self.folder / "videos", videos)
        if self.cache is None:
            check_found(self.folder / "videos", f"{self.name} {split}", self.files)
        self.total, self.unreadable = len(videos), dict[str, str]()
        known = {video: reason for video in videos if (reason := self._known_reason(video))}
        check_share(known, self.total, self.options.max_unreadable, split)
        self._note(known, "left out of the training" if split == "train" else "kept, without frames")
        if not self.options.decode_every_epoch:
            self._refuse_to_decode([video for video in videos if video not in known])
        if split == "train":
            pairs = pairs[~pairs["video_id"].isin(set(known))]

        owners, names = pd.factorize(pairs["video_id"])
        self.video_ids: list[str] = names.tolist()
        self.captions: list[str] = pairs["caption"].tolist()
        self.image_of_caption = owners.astype(np.int64)

    def __len__(self) -> int:
        return len(self.video_ids)

    def visual(self, index: int) -> np.ndarray:
        """``(T, size, size, 3)`` uint8; T is 0 for a video that cannot be read, and else from 1 to `frames`."""
        video = self.video_ids[index]
        if self.cache is not None and video in self.cache:
            return self.cache.frames(video)
        try:
            return self.reading.of(self.files[video])
        except Exception as error:  # whatever a decoder raises, it is the file's fault
            if video not in self.unreadable:
                reason = error.reason if isinstance(error, VideoError) else f"{type(error).__name__}: {error}"
                self._note({video: reason}, "kept, without frames")
            return self.reading.none()

    def thumbnails(self, index: int) -> list[Image.Image]:
        """The frames that the model sees."""
        return [Image.fromarray(frame) for frame in self.visual(index)]

    @property
    def preprocessing(self) -> str:
        """How frames are chosen and resized, what has none, and whether prior work's selection is taken over."""
        text = str(self.reading)
        if self.unreadable:
            text += f"; {len(self.unreadable)} of {self.total} videos of {self.split} cannot be read"
        return text + ("; validation is the test split, as in prior work" if self.options.validation == "test" else "")

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over captions, owners and the digest of each file; without a cache, every file is read for it."""
        return fingerprint(self.captions, self.image_of_caption, self._digests())

    @classmethod
    def prepare(
        cls,
        root: Path,
        cache: Path,
        *,
        workers: int | None = None,
        time_limit: float = TIME_LIMIT,
        **options: Any,
    ) -> None:
        """Write the frame caches of the training list and of the test; a killed call goes on where it ended.

        Args:
            root: folder of all data sets.
            cache: of pretrained encoders; not used.
            workers: processes, None for one a core; 0 decodes in this one, without a time limit.
            time_limit: seconds for one video.
            options: of `MSRVTTOptions`.

        Raises:
            FileNotFoundError: files are missing, or all videos of a list; the message says what to get.
            ValueError: as of the class; too many unreadable videos are told after all others are in the cache.
        """
        chosen, folder = MSRVTTOptions(**options), Path(root) / cls.name
        check_files(folder, (train_file(chosen.train), TEST_FILE, DATA_FILE, "videos"))
        lists = []
        for name in (chosen.train_list, "test"):
            videos = find_videos(folder / "videos", chosen.pairs(folder, name)["video_id"].unique())
            files = CacheFiles(folder / "frames", name, chosen.reading)
            if not files.laid_out:
                check_found(folder / "videos", f"{cls.name} {name}", videos)
            lists.append((files, videos))
        written = []
        for files, videos in lists:
            written.append(write_cache(files, videos, workers=workers, time_limit=time_limit))
            print(written[-1].summary())
        for done in written:
            check_share(done.unreadable, len(done.rows), chosen.max_unreadable, done.files.name)

    @classmethod
    def verify(cls, root: Path, **options: Any) -> Verification:
        """What the files hold beside the published counts, and every video that is missing or cannot be read.

        Args:
            root: folder of all data sets.
            options: of `MSRVTTOptions`, and `decode`, `workers`, `time_limit` of `verify_msrvtt`.
        """
        return verify_msrvtt(Path(root) / cls.name, **options)

    def _known_reason(self, video: str) -> str:
        """Why a video cannot be read, as far as that is known without opening it; "" if it is not."""
        if self.cache is not None and video in self.cache:
            return self.cache.items[video].reason
        return "" if self.files[video].is_file() else "there is no such file"

    def _note(self, reasons: dict[str, str], fate: str) -> None:
        self.unreadable |= reasons
        if reasons:
            what = f"{len(reasons)} of {self.total} videos cannot be read and are {fate}"
            warnings.warn(f"{self.name} {self.split}: {what} ({named(reasons)})", stacklevel=3)

    def _refuse_to_decode(self, videos: list[str]) -> None:
        """Raise if no frame cache holds some of the videos, with the command that mends it."""
        if waiting := [video for video in videos if self.cache is None or video not in self.cache]:
            command = f"python scripts/prepare_data.py data={self.name} root={self.folder.parent}"
            raise FileNotFoundError(
                f"{self.name} {self.split}: no frame cache holds {len(waiting):,} of {self.total:,} videos "
                f"({', '.join(waiting[:3])}{', ...' if len(waiting) > 3 else ''}). To decode each once, within a time "
                f"limit, run {' '.join([command, *self.options.overrides])} ; to decode them in every epoch instead, "
                "without a limit on the time that a damaged one may take, set data.decode_every_epoch=true"
            )

    def _digests(self) -> Iterator[bytes]:
        for video in self.video_ids:
            if self.cache is not None and video in self.cache:
                yield bytes.fromhex(self.cache.items[video].sha256)
            else:
                yield bytes.fromhex(size_and_digest(self.files[video])[1])


def check_share(unreadable: dict[str, str], of: int, most: float, split: str) -> None:
    """Raise a ValueError that names them if more than a share `most` of the videos cannot be read."""
    if len(unreadable) > most * of:
        enough = math.ceil(100 * len(unreadable) / of) / 100
        raise ValueError(
            f"msrvtt {split}: {len(unreadable):,} of {of:,} videos cannot be read, more than max_unreadable={most:g} "
            f"allows ({named(unreadable)}); mend them{f', or set data.max_unreadable={enough}' if enough < 1 else ''}"
        )

"""OpenMoji clips: 1,500 H.264 videos of an emoji in motion with three captions each, for video-text retrieval.

150 emoji, each with all ten `MOTIONS`. Splits are made of pairs: each emoji and each motion is in the training split,
but a pair of the validation or test split is in no other, so a model must put together what it learned apart. The
three captions of a clip name the emoji and the motion in three ways ("an owl spinning", "an owl rotating on the spot",
"a clip of an owl turning round and round"). Left and right, up and down, grow and shrink show the same frames in
opposite orders, which the mean over frames cannot tell apart. Artwork and names are made by people, motions and
sentences are synthetic.

Prepared folder ``<root>/openmoji_clips/``: ``videos/clip00000.mp4`` ... (16 frames, 112 px, 8 frames a second),
``train.csv``, ``validation.csv`` and ``test.csv`` (video_id, sentence), ``clips.csv`` (what each clip shows) and
``manifest.json``.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import av
import numpy as np
import pandas as pd
from PIL import Image
from tqdm.auto import tqdm

from retrieval.data.dataset import SPLITS, check_prepared, fingerprint, make_once
from retrieval.data.embedded_verify import verify_embedded
from retrieval.data.emoji_concepts import concepts, render, with_article
from retrieval.data.motions import MOTIONS, animate, describe
from retrieval.data.scenes import COLOURS
from retrieval.data.verification import Verification
from retrieval.video import read_frames
from retrieval.video.cache import CacheFiles, FrameCache, named
from retrieval.video.cache_writer import write_cache
from retrieval.video.reading import Reading
from retrieval.video.timeline import VideoError, timeline

ARTWORK = "OpenMoji, CC BY-SA 4.0; so are these clips. See ATTRIBUTION.md of resora"
LENGTH = 16  # frames
RATE = 8  # frames a second
CAPTIONS = 3  # a clip


class OpenMojiClips:
    """One split of the clips; a `RetrievalDataset` of video frames.

    Args:
        root: folder of all data sets.
        split: "train", "validation" or "test".
        frames: how many of a clip's 16 frames to read, evenly spaced from the first to the last.
        size: side in pixels that they are resized to, or None for the 112 of the files.
        cache: whether to decode each clip once, into ``<root>/openmoji_clips/frames/``; see `retrieval.video.cache`.

    Raises:
        FileNotFoundError: the data are not prepared; the message says how to.
        ValueError: unknown split, a cache without `size`, or a cache of clips that could not be read.
    """

    name = "openmoji_clips"

    def __init__(self, root: Path, split: str, frames: int = 4, size: int | None = None, cache: bool = False) -> None:
        self.folder = Path(root) / self.name
        self.split, self.reading = split, Reading(frames=frames, size=size)
        check_prepared(self.folder, self.name, split)
        table = pd.read_csv(self.folder / f"{split}.csv")
        owners, self.video_ids = pd.factorize(table["video_id"])
        self.captions: list[str] = table["sentence"].tolist()
        self.image_of_caption = owners.astype(np.int64)
        self.cache = self._cached() if cache else None

    def __len__(self) -> int:
        return len(self.video_ids)

    def visual(self, index: int) -> np.ndarray:
        """``(T, H, W, 3)`` uint8, T = min(frames, 16). Without a cache, decoded anew at each call."""
        if self.cache is not None:
            return self.cache.frames(self.video_ids[index])
        return self.reading.of(self.path(index))

    def thumbnails(self, index: int) -> list[Image.Image]:
        """The frames that the model sees, at the size of the file."""
        return [Image.fromarray(frame) for frame in read_frames(self.path(index), self.reading.frames)]

    def path(self, index: int) -> Path:
        """The file of a clip."""
        return self.folder / "videos" / f"{self.video_ids[index]}.mp4"

    @property
    def preprocessing(self) -> str:
        """How frames are chosen and resized; part of what a result depends on."""
        return str(self.reading)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over captions, owners and the files of the split."""
        return fingerprint(
            self.captions, self.image_of_caption, (self.path(index).read_bytes() for index in range(len(self)))
        )

    @classmethod
    def prepare(
        cls, root: Path, cache: Path, *, clips: tuple[int, int, int] = (1100, 200, 200), size: int = 112, seed: int = 0
    ) -> None:
        """Draw and encode the clips; some seconds, and only once.

        The folder appears when it is complete, so a killed call leaves nothing that looks finished.

        Args:
            root: folder of all data sets.
            cache: not used; the embedded data sets share one signature.
            clips: number of clips in the train, validation and test split.
            size: side of a frame in pixels, even (H.264 stores colours at half the size).
            seed: of the choice of emoji, pairs and backgrounds.

        Raises:
            ValueError: `clips` or `size` does not fit, or the folder was prepared with other arguments.
        """
        if size < 16 or size % 2:
            raise ValueError(f"size {size} is not an even number of pixels from 16 on; the default is 112")
        if min(clips) < 1 or sum(clips) > len(concepts()) * len(MOTIONS):
            most = len(concepts()) * len(MOTIONS)
            raise ValueError(f"clips={clips}; each split needs one, and all together at most {most} pairs exist")
        options = {"clips": list(clips), "size": size, "seed": seed}
        make_once(Path(root) / cls.name, options, ARTWORK, lambda folder: _build(folder, options))

    @classmethod
    def verify(cls, root: Path, *, decode: bool = False, **options: Any) -> Verification:
        """Counts against those that were asked for, and whether each file holds its 16 frames.

        Args:
            root: folder of all data sets.
            decode: whether to decode the frames that are kept, instead of reading each file's index.
            options: of the class.
        """

        def problem(data: OpenMojiClips, index: int) -> str:
            try:
                found = len(timeline(data.path(index)).times)
                if decode:
                    data.reading.of(data.path(index))
            except VideoError as error:
                return str(error)
            return "" if found == LENGTH else f"{data.path(index)} holds {found} frames, expected {LENGTH}"

        return verify_embedded(
            Path(root) / cls.name,
            lambda split: cls(root, split, **options | {"cache": False}),
            problem,
            sizes="clips",
            captions_per_item=CAPTIONS,
        )

    def _cached(self) -> FrameCache:
        videos = {video: self.path(index) for index, video in enumerate(self.video_ids)}
        files = CacheFiles(self.folder / "frames", self.split, self.reading)
        cache = write_cache(files, videos, workers=0)  # our own files: no process to guard against
        if cache.unreadable:
            raise ValueError(f"{self.name} {self.split}: clips cannot be read ({named(cache.unreadable)})")
        return cache


def sample_clips(clips: tuple[int, int, int], seed: int) -> pd.DataFrame:
    """What each clip shows: a table of video_id, split, concept (position in `concepts()`), emoji, motion, background.

    As many emoji as are needed, each with all motions; the pairs are shuffled and dealt to the splits.
    """
    random = np.random.default_rng(seed)
    chosen = random.permutation(len(concepts()))[: -(-sum(clips) // len(MOTIONS))]
    pairs = [(int(concept), motion) for concept in np.sort(chosen) for motion in MOTIONS]
    order = random.permutation(len(pairs))[: sum(clips)]
    table = pd.DataFrame([pairs[position] for position in order], columns=["concept", "motion"])
    table.insert(0, "video_id", [f"clip{number:05d}" for number in range(len(table))])
    table.insert(1, "split", np.repeat(SPLITS, clips))
    table["emoji"] = [concepts()[concept].name for concept in table["concept"]]
    table["background"] = random.choice(list(COLOURS), len(table))
    return table


def encode_h264(path: Path, frames: np.ndarray, rate: int) -> None:
    """Write frames (T, H, W, 3) uint8 as an H.264 file, the same bytes for the same frames and version of x264."""
    # cpu-independent: else the files differ between processors, and with AVX-512 between two calls in one process
    options = {"crf": "20", "preset": "veryfast", "threads": "1", "x264-params": "cpu-independent=1"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def _build(folder: Path, options: dict) -> None:
    table = sample_clips(tuple(options["clips"]), options["seed"])
    size = options["size"]
    (folder / "videos").mkdir()
    drawn = {concept: render(concepts()[concept].svg, size) for concept in table["concept"].unique()}

    def write(row: Any) -> None:
        frames = animate(drawn[row.concept], row.motion, COLOURS[row.background], size, LENGTH)
        encode_h264(folder / "videos" / f"{row.video_id}.mp4", frames, RATE)

    with ThreadPoolExecutor(2) as pool:  # Pillow and x264 work outside Python's lock
        list(tqdm(pool.map(write, table.itertuples()), total=len(table), desc="drawing clips", unit="clip"))
    for split, clips in table.groupby("split"):
        captions = [
            (row.video_id, sentence)
            for row in clips.itertuples()
            for sentence in describe(with_article(row.emoji), row.motion)
        ]
        pd.DataFrame(captions, columns=["video_id", "sentence"]).to_csv(folder / f"{split}.csv", index=False)
    table.to_csv(folder / "clips.csv", index=False)

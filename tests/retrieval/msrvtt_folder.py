"""Small files of MSR-VTT's published form, with real videos; no test module, so that several can import it."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from video_files import CLOSED, encode

from retrieval.data import MSRVTT

TRAIN = [f"video{number}" for number in (3, 1, 0, 2, 7, 5)]
TEST = ["video7020", "video9975", "video8000"]
SENTENCES = ["a man playing video games", "null", "a man playing video games"]  # one occurs twice, one looks like none
SMALL: dict[str, Any] = {"size": 32, "validation": 2, "check_counts": False, "decode_every_epoch": True}


def annotate(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, videos in (("9k", TRAIN), ("7k", TRAIN[:4])):
        (folder / f"MSRVTT_train.{name}.csv").write_text("\n".join(["video_id", *videos]) + "\n")
    with (folder / "MSRVTT_JSFUSION_test.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["key", "vid_key", "video_id", "sentence"])
        for number, (video, sentence) in enumerate(zip(TEST, SENTENCES, strict=True)):
            rows.writerow([f"ret{number}", video.replace("video", "msr"), video, sentence])
    everything = [f"video{number}" for number in range(8)] + TEST
    videos = [
        {
            "id": number,
            "video_id": video,
            "category": 9,
            "url": "",
            "start time": 0.0,
            "end time": 9.0,
            "split": "train",
        }
        for number, video in enumerate(everything)
    ]
    sentences = [  # as in the published file, the 20 of a video do not follow one another
        {"sen_id": 100 * take + number, "video_id": video, "caption": f"take {take} of {video}"}
        for take in range(20)
        for number, video in enumerate(everything)
    ]
    (folder / "MSRVTT_data.json").write_text(json.dumps({"info": {}, "videos": videos, "sentences": sentences}))


def write_sound(root: Path) -> None:
    """A root where every video is sound; one of the test is WebM."""
    annotate(root / "msrvtt")
    (root / "msrvtt" / "videos").mkdir()
    for number, video in enumerate((*TRAIN, *TEST[:2])):
        encode(root / "msrvtt" / "videos" / f"{video}.mp4", 50 + 24 * number, options=CLOSED)
    webm = root / "msrvtt" / "videos" / f"{TEST[2]}.webm"
    encode(webm, 40, codec="libvpx-vp9", options={"deadline": "realtime", "cpu-used": "8"})


def prepare(root: Path, **options: Any) -> None:
    MSRVTT.prepare(root, root / "cache", workers=0, **{"size": 32, "check_counts": False, **options})

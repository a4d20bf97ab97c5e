"""Small files of bottom-up attention's and Karpathy's forms; no test module, so that several can import it."""

from __future__ import annotations

import base64
import csv
import json
from pathlib import Path

import numpy as np

WIDTH = 6
SPLITS = {"train": [11, 4], "dev": [9], "test": [2]}


def regions(number: int, boxes: int = 3) -> np.ndarray:
    return np.random.default_rng(number).random((boxes, WIDTH)).astype("<f4")


def row(number: int, features: np.ndarray) -> list[str]:
    boxes = np.zeros((len(features), 4), dtype="<f4")
    coded = [base64.b64encode(array.tobytes()).decode() for array in (boxes, features)]
    return [str(number), "640", "480", str(len(features)), *coded]


def write_tsv(path: Path, rows: list[list[str]]) -> Path:
    """As bottom-up attention's own script writes it: the csv module with tabs and its default line end."""
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows(rows)
    return path


def write_karpathy(path: Path, name: str = "flickr30k") -> Path:
    def image(imgid: int, split: str, captions: int = 5, **more: object) -> dict:
        sentences = [{"raw": f" Caption {n}\nof {imgid} . ", "tokens": [], "sentid": n} for n in range(captions)]
        return {"imgid": imgid, "filename": f"{100 + imgid}.jpg", "split": split, "sentences": sentences, **more}

    more = {"filepath": "val2014", "cocoid": 77} if name == "coco" else {}
    images = [image(11, "train"), image(2, "test", 6, **more), image(4, "restval" if name == "coco" else "train")]
    path.write_text(json.dumps({"dataset": name, "images": [*images, image(9, "val")]}))
    return path

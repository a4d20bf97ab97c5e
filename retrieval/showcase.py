"""What a trained model retrieves: the first five pictures for a dozen test sentences, stored for the report."""

from __future__ import annotations

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from retrieval.data import RetrievalDataset
from retrieval.evaluate import Encoded
from retrieval.regions.pictures import SIDE, placeholder
from training import RunFolder


def save_showcase(run: RunFolder, data: RetrievalDataset, encoded: Encoded, *, queries: int = 12, k: int = 5) -> None:
    """Write retrieved.json and thumbnails/ of a run.

    The queries are evenly spaced over the split's captions, chosen before anything is retrieved. An item whose picture
    cannot be read, or that has no frames, is a grey square with its number; how many there are is printed.
    """
    k = min(k, len(data))
    chosen = np.unique(np.linspace(0, len(encoded.texts) - 1, queries).astype(np.int64))
    scores, items = encoded.top_k(chosen, k)
    records = [
        {
            "direction": "t2i",
            "query": data.captions[caption],
            "results": [
                {"item": int(item), "score": float(score), "right": bool(item == data.image_of_caption[caption])}
                for item, score in zip(row_items, row_scores, strict=True)
            ],
        }
        for caption, row_items, row_scores in zip(chosen, items, scores, strict=True)
    ]
    folder = run.path / "thumbnails"
    folder.mkdir(parents=True, exist_ok=True)
    shown, unreadable = np.unique(items).tolist(), list[str]()
    for item in shown:
        pictures, reason = list[Image.Image](), "it has no frames"
        try:
            pictures = _small(data.thumbnails(item))
        except Exception as error:  # whatever Pillow's decoders raise, it is the file's fault
            reason = f"{type(error).__name__}: {error}"
        if not pictures:
            unreadable.append(" ".join(f"item {item}, {reason}".split()))
            pictures = [placeholder(item)]
        for frame, picture in enumerate(pictures):
            picture.save(folder / (f"{item}.png" if len(pictures) == 1 else f"{item}_{frame}.png"))
    if unreadable:
        tqdm.write(
            f"{len(unreadable)} of {len(shown)} pictures for the report cannot be read and are grey squares in it "
            f"({unreadable[0]})"
        )
    run.write_json("retrieved.json", {"k": k, "queries": records})


def _small(pictures: list[Image.Image]) -> list[Image.Image]:
    return [picture.convert("RGB").resize((SIDE, SIDE)) for picture in pictures]

"""What a trained model retrieves: the first five pictures for a dozen test sentences, stored for the report."""

from __future__ import annotations

import numpy as np

from retrieval.data import RetrievalDataset
from retrieval.evaluate import Encoded
from training import RunFolder


def save_showcase(run: RunFolder, data: RetrievalDataset, encoded: Encoded, *, queries: int = 12, k: int = 5) -> None:
    """Write retrieved.json and thumbnails/ of a run.

    The queries are evenly spaced over the split's captions, chosen before anything is retrieved.
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
    for item in np.unique(items):
        pictures = data.thumbnails(int(item))
        for frame, picture in enumerate(pictures):
            name = f"{item}.png" if len(pictures) == 1 else f"{item}_{frame}.png"
            picture.convert("RGB").resize((96, 96)).save(folder / name)
    run.write_json("retrieved.json", {"k": k, "queries": records})

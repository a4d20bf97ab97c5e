"""Encode a split and hand the embeddings to `eval`."""

from __future__ import annotations

import numpy as np
import torch
from tqdm.auto import tqdm

from eval import retrieval_metrics
from retrieval.batch import Captions, collate_text
from retrieval.data import RetrievalDataset
from retrieval.model import RetrievalModel


@torch.inference_mode()
def encode(
    model: RetrievalModel,
    data: RetrievalDataset,
    captions: Captions,
    *,
    batch_size: int = 64,
    precision: str = "float32",
) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings of every image once and of every caption: float32 (n, D) and (M, D), in the data's order.

    Captions are encoded in batches of similar length, so that little is spent on padding. The model is left in the mode
    (training or evaluation) that it was in.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    images: list[np.ndarray] = []
    total, name = len(data) + len(captions.ids), f"encoding {data.split}"
    with (
        torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16"),
        tqdm(total=total, desc=name, unit="item", leave=False, delay=1) as bar,
    ):
        for start in range(0, len(data), batch_size):
            batch = model.collate_visual([data.visual(i) for i in range(start, min(start + batch_size, len(data)))])
            images.append(model.encode_visual(**{k: v.to(device) for k, v in batch.items()}).float().cpu().numpy())
            bar.update(len(images[-1]))
        by_length = np.argsort([len(ids) for ids in captions.ids], kind="stable")
        texts: np.ndarray | None = None
        for start in range(0, len(by_length), 2 * batch_size):
            rows = by_length[start : start + 2 * batch_size]
            batch = collate_text([captions.ids[i] for i in rows])
            encoded = model.encode_text(**{k: v.to(device) for k, v in batch.items()}).float().cpu().numpy()
            texts = np.empty((len(by_length), encoded.shape[1]), np.float32) if texts is None else texts
            texts[rows] = encoded
            bar.update(len(rows))
    model.train(was_training)
    assert texts is not None
    return np.concatenate(images), texts


def evaluate(
    model: RetrievalModel,
    data: RetrievalDataset,
    captions: Captions,
    *,
    batch_size: int = 64,
    precision: str = "float32",
) -> dict[str, float]:
    """Recall@K, median and mean rank both ways, and Rsum of `model` on a split (see `eval.retrieval_metrics`)."""
    images, texts = encode(model, data, captions, precision=precision)
    return retrieval_metrics(images, texts, data.image_of_caption)

"""Encode a split and hand the embeddings, or the scores of pairs, to `eval`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm.auto import tqdm

from eval import retrieval_metrics, score_metrics, top_k, top_k_of_scores
from retrieval.batch import Captions, collate_text
from retrieval.data import RetrievalDataset
from retrieval.model import RetrievalModel


@dataclass(frozen=True)
class Encoded:
    """A split as a model sees it.

    Attributes:
        images: (n, D) float32 embeddings, in the data's order.
        texts: (M, D) likewise, one a caption.
        scores: (n, M) of a model that scores pairs (`RetrievalModel.pair_scores`), whose `images` and `texts` are what
            it scores; None where scores are cosines of embeddings.
    """

    images: NDArray[np.float32]
    texts: NDArray[np.float32]
    scores: NDArray[np.float32] | None = None

    def metrics(self, image_of_caption: NDArray[np.int64]) -> dict[str, float]:
        """Recall@K, median and mean rank both ways, and Rsum (see `eval.retrieval_metrics`)."""
        if self.scores is not None:
            return score_metrics(self.scores, image_of_caption)
        return retrieval_metrics(self.images, self.texts, image_of_caption)

    def top_k(self, captions: NDArray[np.int64], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The k best images of some captions, best first: scores and numbers, (len(captions), k) each."""
        if self.scores is not None:
            return top_k_of_scores(self.scores[:, captions].T, k)
        return top_k(self.texts[captions], self.images, k)


@torch.inference_mode()
def encode(
    model: RetrievalModel,
    data: RetrievalDataset,
    captions: Captions,
    *,
    batch_size: int = 64,
) -> Encoded:
    """Encode every image and every caption, and score all pairs where the model asks for it.

    In float32, whatever precision the training had: bfloat16 has two to three digits, and neighbours in a ranking may
    differ in later ones.

    Captions are encoded in batches of similar length, so that little is spent on padding. The model is left in the mode
    (training or evaluation) that it was in.

    An item that holds nothing, such as a clip without a readable frame, stays in the gallery, so that results are of
    the same split for everybody: it is made orthogonal to every caption, or, where pairs are scored, worse than every
    other, and ties stand in a random order (`eval.ranks`). How many there are is printed.

    Raises:
        ValueError: for a split of no items.
    """
    if not len(data):
        raise ValueError(f"the {data.split} split holds nothing that could be encoded (data.validation=0?)")
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    images: list[np.ndarray] = []
    wanted = data.image_of_caption if model.image_for_each_caption else np.arange(len(data))
    total, name = len(wanted) + len(captions.ids), f"encoding {data.split}"
    with (
        torch.autocast(device.type, enabled=False),
        tqdm(total=total, desc=name, unit="item", leave=False, delay=1) as bar,
    ):
        for start in range(0, len(wanted), batch_size):
            batch = model.collate_visual([data.visual(int(image)) for image in wanted[start : start + batch_size]])
            images.append(model.encode_visual(**{k: v.to(device) for k, v in batch.items()}).float().cpu().numpy())
            bar.update(len(images[-1]))
        by_length = np.argsort([len(ids) for ids in captions.ids], kind="stable")
        texts: np.ndarray | None = None
        for start in range(0, len(by_length), 2 * batch_size):
            rows = by_length[start : start + 2 * batch_size]
            batch = collate_text([captions.ids[i] for i in rows], model.text_length)
            encoded = model.encode_text(**{k: v.to(device) for k, v in batch.items()}).float().cpu().numpy()
            texts = np.empty((len(by_length), encoded.shape[1]), np.float32) if texts is None else texts
            texts[rows] = encoded
            bar.update(len(rows))
        assert texts is not None
        # One embedding an image, the first; np.unique sorts, so rows are in the data's order.
        visual, scores = np.concatenate(images)[np.unique(wanted, return_index=True)[1]], None
        if model.pair_scores is not None:
            scores = _score_pairs(model, visual, texts, batch_size)
    model.train(was_training)
    if (empty := ~visual.reshape(len(visual), -1).any(axis=1)).any():
        tqdm.write(
            f"{empty.sum()} of {len(visual)} {data.split} items hold nothing that could be encoded and match nothing"
        )
        if scores is None:
            visual, texts = _with_direction(visual, texts)
        else:
            scores[empty] = np.nextafter(scores.min(), -np.inf)  # a head that scores pairs gives no frames a score too
    return Encoded(visual, texts, scores)


def _score_pairs(model: RetrievalModel, images: np.ndarray, texts: np.ndarray, batch_size: int) -> np.ndarray:
    """(n, M) float32: a forward pass of `pair_scores` for each pair."""
    device = next(model.parameters()).device
    scores = np.empty((len(images), len(texts)), np.float32)
    items = torch.from_numpy(images).to(device)
    with tqdm(total=len(texts), desc="scoring pairs", unit="caption", leave=False, delay=1) as bar:
        for start in range(0, len(texts), batch_size):
            some = torch.from_numpy(texts[start : start + batch_size]).to(device)
            scores[:, start : start + len(some)] = model.pair_scores(some, items).float().cpu().numpy().T
            bar.update(len(some))
    return scores


def _with_direction(images: np.ndarray, texts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One dimension more, in which lie the images that are zero, and nothing else."""
    empty = ~images.any(axis=1, keepdims=True)
    return np.hstack([images, empty.astype(np.float32)]), np.hstack([texts, np.zeros((len(texts), 1), np.float32)])

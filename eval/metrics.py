"""Standings -> the numbers of a retrieval table: R@1, R@5, R@10, MedR, MeanR in both directions, and Rsum."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike

from eval.index import CHUNK_SIZE
from eval.inputs import caption_owners, unit_rows
from eval.ranks import Standings, answer_standings, standings_of_scores

RECALL_AT = (1, 5, 10)
DIRECTIONS = ("i2t", "t2i")
RECALL_KEYS = tuple(f"{direction}_R@{k}" for direction in DIRECTIONS for k in RECALL_AT)


def retrieval_metrics(
    images: ArrayLike,
    texts: ArrayLike,
    image_of_text: ArrayLike,
    *,
    distractors: bool = False,
    chunk_size: int = CHUNK_SIZE,
) -> dict[str, float]:
    """Cross-modal retrieval by cosine, images to texts ("i2t") and texts to images ("t2i").

    R@K is a hit rate: the percentage of queries whose best right answer has a rank of at most K. With several captions
    an image is a hit when one of them is found, so this is not the recall of information retrieval. What ties
    with the best right answer stands in a random order, and all numbers are expectations over it (`Standings`): one
    wrong answer tied for the first place makes half a hit at 1 and a rank of 1.5.

    Args:
        images: (N, D) array or torch tensor of image or video embeddings, once each; normalised here.
        texts: (M, D) caption embeddings, likewise.
        image_of_text: (M,) integers, the row of images that each caption describes; any number of captions an image.
        distractors: whether images without a caption are meant: they stay in the gallery of text-to-image, and are no
            queries of image-to-text. Without it they are refused, as they mostly are a mistake.
        chunk_size: queries scored at a time; the N x M matrix is never built, and the numbers do not depend on it.

    Returns:
        "i2t_R@1", "i2t_R@5", "i2t_R@10" (percent), "i2t_MedR" (the median, which VSE++ rounds down), "i2t_MeanR", the
        same five with "t2i_", and "rsum", the sum of the six recalls (0..600).

    Raises:
        ValueError: for wrong shapes, NaN, infinite or all-zero rows, and images without a caption that are not meant.
    """
    image_rows, text_rows = unit_rows(images, "images"), unit_rows(texts, "texts")
    if image_rows.shape[1] != text_rows.shape[1]:
        raise ValueError(
            f"images have {image_rows.shape[1]} dimensions and texts {text_rows.shape[1]}; "
            "both must be projected into the same embedding space"
        )
    owners = caption_owners(image_of_text, len(image_rows), distractors=distractors)
    if len(owners) != len(text_rows):
        raise ValueError(
            f"image_of_text: expected one entry for each of the {len(text_rows)} texts; received {len(owners)}"
        )
    captions = np.arange(len(owners))
    described, query = np.unique(owners, return_inverse=True)  # all images, but for distractors
    i2t = answer_standings(image_rows[described], text_rows, query, captions, chunk_size=chunk_size)
    t2i = answer_standings(text_rows, image_rows, captions, owners, chunk_size=chunk_size)
    return with_rsum({"i2t": _summary(i2t), "t2i": _summary(t2i)})


def score_metrics(scores: ArrayLike, image_of_text: ArrayLike) -> dict[str, float]:
    """`retrieval_metrics` of a model that scores each pair, and has no embeddings to search among.

    Args:
        scores: (N, M) of each image with each text, any real numbers; more is better.
        image_of_text: (M,) integers, as in `retrieval_metrics`.

    Returns:
        The keys of `retrieval_metrics`.

    Raises:
        ValueError: for another shape, for NaN or infinite scores, and for images without a caption.
    """
    matrix = np.asarray(scores)
    matrix = matrix if np.issubdtype(matrix.dtype, np.floating) else matrix.astype(np.float64)
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise ValueError(f"scores: expected one row an image and one column a text; received shape {matrix.shape}")
    if broken := int(np.count_nonzero(~np.isfinite(matrix))):
        raise ValueError(
            f"scores: {broken} of {matrix.size} are NaN or infinite, so they have no rank; "
            "look for a diverged run or an overflow in half precision"
        )
    owners = caption_owners(image_of_text, len(matrix))
    if len(owners) != matrix.shape[1]:
        raise ValueError(
            f"image_of_text: expected one entry for each of the {matrix.shape[1]} texts; received {len(owners)}"
        )
    captions = np.arange(len(owners))
    i2t = standings_of_scores([(0, matrix)], len(matrix), owners, captions)
    t2i = standings_of_scores([(0, matrix.T)], len(owners), captions, owners)
    return with_rsum({"i2t": _summary(i2t), "t2i": _summary(t2i)})


def with_rsum(directions: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """{"i2t": {"R@1": ...}, "t2i": ...} as one flat dict, "i2t_R@1" ..., and "rsum", the sum of the six recalls."""
    flat = {f"{direction}_{name}": value for direction, values in directions.items() for name, value in values.items()}
    return {**flat, "rsum": sum(flat[key] for key in RECALL_KEYS)}


def _summary(standings: Standings) -> dict[str, float]:
    ranks = standings.expected_rank()
    recalls = {f"R@{k}": float(100 * np.mean(standings.found_by(k))) for k in RECALL_AT}
    return {**recalls, "MedR": float(np.median(ranks)), "MeanR": float(np.mean(ranks))}

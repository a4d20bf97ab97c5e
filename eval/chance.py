"""What a random ranking scores: the line every table of retrieval results should be read against."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from eval.inputs import caption_owners
from eval.metrics import RECALL_AT, with_rsum


def chance_level(image_of_text: ArrayLike, n_images: int, *, distractors: bool = False) -> dict[str, float]:
    """Expectation of `retrieval_metrics` when every query orders its gallery uniformly at random, without ties.

    With c right answers among M, the best one stands below place K with the hypergeometric probability

        P(rank > K) = C(M - K, c) / C(M, c) = prod_{j < c} (M - K - j) / (M - j),    E[rank] = (M + 1) / (c + 1)

    R@K and MeanR are exact means over the queries, whose numbers of captions may differ. MedR is the median of the rank
    of a query drawn at random, to which the median of many queries converges; for t2i it is also exactly the
    expectation, (N + 1) / 2, by symmetry.

    Args:
        image_of_text: (M,) integers, as in `retrieval_metrics`.
        n_images: number of images N.
        distractors: whether images without a caption are meant, as in `retrieval_metrics`.

    Returns:
        The keys of `retrieval_metrics`.

    Raises:
        ValueError: as `retrieval_metrics` for its image_of_text.
    """
    owners = caption_owners(image_of_text, n_images, distractors=distractors)
    _, captions = np.unique(owners, return_counts=True)  # of each image that has one
    one_image = np.ones(1, dtype=np.int64)  # every caption has one, so one query stands for all
    return with_rsum({"i2t": _level(len(owners), captions), "t2i": _level(n_images, one_image)})


def _level(gallery: int, right: NDArray[np.int64]) -> dict[str, float]:
    """Level of one direction: right (Q,) is the number of right answers of each query among `gallery` items."""
    counts, queries = np.unique(right, return_counts=True)
    share = queries / queries.sum()
    found = sum(weight * _found_by(gallery, int(count)) for count, weight in zip(counts, share, strict=True))
    recalls = {f"R@{k}": float(100 * found[min(k, gallery)]) for k in RECALL_AT}
    # where the distribution passes exactly through 1/2 the median is the middle of that step, as for an even sample
    median = (np.argmax(found >= 0.5 - 1e-12) + np.argmax(found > 0.5 + 1e-12)) / 2
    return {**recalls, "MedR": float(median), "MeanR": float(share @ ((gallery + 1) / (counts + 1)))}


def _found_by(gallery: int, right: int) -> NDArray[np.float64]:
    """P(best rank <= K) for K = 0..gallery, shape (gallery + 1,)."""
    places = np.arange(gallery + 1)
    missed = np.ones(gallery + 1)
    for j in range(right):
        missed *= np.clip(gallery - places - j, 0, None) / (gallery - j)
    return 1 - missed

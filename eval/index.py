"""Exact inner products by `faiss.IndexFlatIP`, streamed over chunks of queries. Nothing else imports faiss."""

from __future__ import annotations

from collections.abc import Iterator

import faiss
import numpy as np
from numpy.typing import ArrayLike, NDArray
from tqdm.auto import tqdm

from eval.inputs import unit_rows

CHUNK_SIZE = 256  # queries at a time; working memory is about 5 bytes x CHUNK_SIZE x gallery
TILE_SIZE = 256  # gallery rows that all queries of a chunk are scored against in turn: 1 MB at D = 1,024 stays in cache


def score_chunks(
    queries: NDArray[np.float32], gallery: NDArray[np.float32], *, chunk_size: int = CHUNK_SIZE
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Inner products of each query with the whole gallery, at most chunk_size queries at a time, in order.

    Each score is a function of its two rows alone, to the last bit: equal rows tie exactly wherever they stand, and
    neither chunk_size nor the number of threads can move a rank. `IndexFlatIP.search` does not promise this. It
    multiplies blocks with BLAS, which sums the rows at a block's end in another order, so that copies of one row differ
    in the last bit; the product of two single rows, `compute_distance_subset`, does not. It also spares the sorting of
    the gallery that `search(k=ntotal)` would do. But it reads all that it is given once for each query: hence tiles of
    the gallery that stay in the cache, about twice as fast for 25,000 rows of 1,024.

    Args:
        queries: (Q, D) float32, used as they are; unit rows give cosines.
        gallery: (N, D) float32, likewise.
        chunk_size: queries scored at a time.

    Yields:
        (number of the first query of the chunk, scores (B, N) float32), B <= chunk_size. What takes longer than a few
        seconds shows its progress.

    Raises:
        ValueError: if chunk_size is below 1, or queries and gallery differ in width.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size: expected at least 1 query at a time; received {chunk_size}")
    if queries.shape[1] != gallery.shape[1]:
        raise ValueError(
            f"queries have {queries.shape[1]} dimensions and the gallery {gallery.shape[1]}; "
            "both must be projected into the same embedding space"
        )
    index = faiss.IndexFlatIP(gallery.shape[1])
    index.add(np.ascontiguousarray(gallery, dtype=np.float32))
    with tqdm(total=len(queries), desc="scoring", unit="query", leave=False, delay=3) as bar:
        for start in range(0, len(queries), chunk_size):
            chunk = np.ascontiguousarray(queries[start : start + chunk_size], dtype=np.float32)
            scores = np.empty((len(chunk), len(gallery)), dtype=np.float32)
            for first in range(0, len(gallery), TILE_SIZE):
                scores[:, first : first + TILE_SIZE] = _tile(index, chunk, first)
            yield start, scores
            bar.update(len(chunk))


def _tile(index: faiss.IndexFlatIP, chunk: NDArray[np.float32], first: int) -> NDArray[np.float32]:
    """Inner products of a chunk with the TILE_SIZE rows of the gallery from `first` on, fewer at its end."""
    items = np.arange(first, min(first + TILE_SIZE, index.ntotal), dtype=np.int64)
    everything = np.tile(items, (len(chunk), 1))
    scores = np.empty(everything.shape, dtype=np.float32)
    # faiss has no NumPy wrapper (nor stub) for this method: it takes pointers to C-contiguous arrays of these types
    index.compute_distance_subset(  # type: ignore[attr-defined]
        len(chunk), faiss.swig_ptr(chunk), len(items), faiss.swig_ptr(scores), faiss.swig_ptr(everything)
    )
    return scores


def top_k(
    queries: ArrayLike, gallery: ArrayLike, k: int, *, chunk_size: int = CHUNK_SIZE
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The k gallery rows with the greatest cosine to each query, best first; of equal scores the lower index is first.

    faiss itself returns ties in an order that depends on k (faiss #1985); here it depends on the scores alone.

    Args:
        queries: (Q, D) array or torch tensor; rows are normalised here, as in `retrieval_metrics`.
        gallery: (N, D), likewise.
        k: how many, 1..N.
        chunk_size: queries scored at a time.

    Returns:
        scores (Q, k) float32, cosines, and indices (Q, k) int64 into the gallery.

    Raises:
        ValueError: for k outside 1..N; for wrong shapes, NaN, infinite or all-zero rows.
    """
    query_rows, gallery_rows = unit_rows(queries, "queries"), unit_rows(gallery, "gallery")
    if not 1 <= k <= len(gallery_rows):
        raise ValueError(f"k: expected 1..{len(gallery_rows)}, the number of gallery rows; received {k}")
    best_scores, best_items = [], []
    for _, scores in score_chunks(query_rows, gallery_rows, chunk_size=chunk_size):
        best = top_k_of_scores(scores, k)
        best_scores.append(best[0])
        best_items.append(best[1])
    return np.concatenate(best_scores), np.concatenate(best_items)


def top_k_of_scores(scores: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The k greatest entries of each row of (Q, N), 1 <= k <= N, and their columns, (Q, k) each, greatest first.

    Of equal ones the first is first. Only what reaches the k-th greatest score is sorted: sorting a gallery takes
    longer than scoring it.
    """
    least = np.partition(scores, -k, axis=1)[:, -k]
    items = np.empty((len(scores), k), dtype=np.int64)
    for row, bound, chosen in zip(scores, least, items, strict=True):
        reaching = np.flatnonzero(row >= bound)  # k of them, or more where the last place is tied; in order
        chosen[:] = reaching[np.argsort(-row[reaching], kind="stable")[:k]]
    return np.take_along_axis(scores, items, axis=1), items

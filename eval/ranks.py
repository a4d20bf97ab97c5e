"""Scores -> ranks: where the best right answer of each query stands, with ties counted half."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from eval.index import CHUNK_SIZE, score_chunks


def answer_ranks(
    queries: NDArray[np.float32],
    gallery: NDArray[np.float32],
    pair_query: NDArray[np.int64],
    pair_item: NDArray[np.int64],
    *,
    chunk_size: int = CHUNK_SIZE,
) -> NDArray[np.float64]:
    r"""Rank of the best right answer of each query, from 1.

    .. math:: rank = 1 + \#\{wrong: s > s^+\} + \tfrac12 \#\{wrong: s = s^+\}, \quad s^+ = \max_{right} s

    Half the ties is neither the optimist's rank nor the pessimist's: constant embeddings get the middle of the gallery,
    not an R@1 of 100 or of 0. Other right answers of the same query never count, neither above nor tied. Without ties
    it is the convention of prior work: VSE++ takes the least position of an image's five captions among all captions.

    The score of a right answer is read from the scores it is ranked against. Computed on its own it could differ in the
    last bit, and the answer rank below itself.

    Args:
        queries: (Q, D) unit rows.
        gallery: (N, D) unit rows.
        pair_query: (P,) and
        pair_item: (P,) are the right answers: item pair_item[p] for query pair_query[p]; every query has one or more.
        chunk_size: queries scored at a time.

    Returns:
        (Q,) float64; an odd number of ties gives x.5.
    """
    return ranks_of_scores(score_chunks(queries, gallery, chunk_size=chunk_size), len(queries), pair_query, pair_item)


def ranks_of_scores(
    chunks: Iterable[tuple[int, NDArray[np.floating]]],
    queries: int,
    pair_query: NDArray[np.int64],
    pair_item: NDArray[np.int64],
) -> NDArray[np.float64]:
    """`answer_ranks` from scores: (number of the first query of the chunk, scores (B, N)) each, of all queries."""
    order = np.argsort(pair_query, kind="stable")
    pair_query, pair_item = pair_query[order], pair_item[order]
    ranks = np.empty(queries)
    for start, scores in chunks:
        stop = start + len(scores)
        first, last = np.searchsorted(pair_query, (start, stop))
        rows = pair_query[first:last] - start
        right = scores[rows, pair_item[first:last]]  # (pairs of this chunk,)
        best = np.full(len(scores), -np.inf, dtype=scores.dtype)
        np.maximum.at(best, rows, right)
        greater = np.count_nonzero(scores > best[:, None], axis=1)  # all wrong: no right answer is above the best one
        equal = np.count_nonzero(scores == best[:, None], axis=1)
        equal_right = np.bincount(rows[right == best[rows]], minlength=len(scores))
        ranks[start:stop] = 1 + greater + (equal - equal_right) / 2
    return ranks

"""Scores -> where the best right answer of each query stands, as an expectation over the order of what ties with it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eval.index import CHUNK_SIZE, score_chunks


@dataclass(frozen=True)
class Standings:
    """Where the best right answer of each query stands: what is above it and what ties with it.

    Ties stand in a random order, each as likely as the others. That is neither the optimist's nor the pessimist's
    reading: constant embeddings score at chance, not an R@1 of 100 or of 0. Other right answers below the best one
    never count. Without ties it is the convention of prior work: VSE++ takes the least position of an image's five
    captions among all captions.

    Attributes:
        above: (Q,) int64, wrong answers with a greater score than the best right one.
        wrong: (Q,) int64, wrong answers with the same score.
        right: (Q,) int64, right answers with it, 1 or more.
    """

    above: NDArray[np.int64]
    wrong: NDArray[np.int64]
    right: NDArray[np.int64]

    def expected_rank(self) -> NDArray[np.float64]:
        r"""Expected rank of the first right answer, from 1, shape (Q,).

        .. math:: E[rank] = 1 + above + \frac{wrong}{right + 1}

        Each tied wrong answer stands before all of the tied right ones with probability 1 / (right + 1). One right
        answer counts half of its ties.
        """
        return 1 + self.above + self.wrong / (self.right + 1)

    def found_by(self, k: int) -> NDArray[np.float64]:
        r"""Probability that a right answer is among the first k, shape (Q,): 0 or 1 but for ties.

        .. math:: P(rank \le k) = 1 - \prod_{j < k - above} \frac{wrong - j}{wrong + right - j}

        The k - above places that are left are filled from the ties without replacement, and each draw of the product is
        another wrong one. With one right answer that is (k - above) / (wrong + 1), clipped to 0..1.
        """
        missed = np.ones(len(self.above))
        for place in range(k):
            wrong = np.clip(self.wrong - place, 0, None)  # 0: all of them are above already, and a right one is next
            missed = np.where(place < k - self.above, missed * wrong / (wrong + self.right), missed)
        return 1 - missed


def answer_standings(
    queries: NDArray[np.float32],
    gallery: NDArray[np.float32],
    pair_query: NDArray[np.int64],
    pair_item: NDArray[np.int64],
    *,
    chunk_size: int = CHUNK_SIZE,
) -> Standings:
    """Where the best right answer of each query stands in the gallery, by inner product.

    The score of a right answer is read from the scores it is ranked against. Computed on its own it could differ in the
    last bit, and the answer rank below itself.

    Args:
        queries: (Q, D) unit rows.
        gallery: (N, D) unit rows.
        pair_query: (P,) and
        pair_item: (P,) are the right answers: item pair_item[p] for query pair_query[p]; every query has one or more.
        chunk_size: queries scored at a time.
    """
    chunks = score_chunks(queries, gallery, chunk_size=chunk_size)
    return standings_of_scores(chunks, len(queries), pair_query, pair_item)


def standings_of_scores(
    chunks: Iterable[tuple[int, NDArray[np.floating]]],
    queries: int,
    pair_query: NDArray[np.int64],
    pair_item: NDArray[np.int64],
) -> Standings:
    """`answer_standings` from scores: (number of the first query of the chunk, scores (B, N)) each, of all queries."""
    order = np.argsort(pair_query, kind="stable")
    pair_query, pair_item = pair_query[order], pair_item[order]
    above, wrong, right = np.empty((3, queries), dtype=np.int64)
    for start, scores in chunks:
        stop = start + len(scores)
        first, last = np.searchsorted(pair_query, (start, stop))
        rows = pair_query[first:last] - start
        answers = scores[rows, pair_item[first:last]]  # (pairs of this chunk,)
        best = np.full(len(scores), -np.inf, dtype=scores.dtype)
        np.maximum.at(best, rows, answers)
        above[start:stop] = np.count_nonzero(scores > best[:, None], axis=1)  # none of them right: best is the maximum
        right[start:stop] = np.bincount(rows[answers == best[rows]], minlength=len(scores))
        wrong[start:stop] = np.count_nonzero(scores == best[:, None], axis=1) - right[start:stop]
    return Standings(above, wrong, right)

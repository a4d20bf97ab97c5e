"""Scores and top-k lists against NumPy in float64, and the promise that equal rows have equal scores."""

from __future__ import annotations

import numpy as np
import pytest

from eval import top_k
from eval.index import score_chunks
from eval.inputs import unit_rows


def _all_scores(queries: np.ndarray, gallery: np.ndarray, chunk_size: int) -> np.ndarray:
    chunks = list(score_chunks(queries, gallery, chunk_size=chunk_size))
    assert [start for start, _ in chunks] == list(range(0, len(queries), chunk_size))
    assert max(len(scores) for _, scores in chunks) <= chunk_size
    return np.concatenate([scores for _, scores in chunks])


@pytest.mark.parametrize("width", [1, 3, 31, 384])
def test_scores_are_the_inner_products(width: int) -> None:
    rng = np.random.default_rng(width)
    queries, gallery = unit_rows(rng.normal(size=(37, width)), "q"), unit_rows(rng.normal(size=(101, width)), "g")
    exact = queries.astype(np.float64) @ gallery.astype(np.float64).T
    np.testing.assert_allclose(_all_scores(queries, gallery, 16), exact, atol=5e-7)


@pytest.mark.parametrize("items", [2, 37, 503, 1025])
@pytest.mark.parametrize("width", [7, 100, 513])
def test_copies_of_a_row_tie_to_the_last_bit_wherever_they_stand(items: int, width: int) -> None:
    rng = np.random.default_rng(items)
    gallery = rng.normal(size=(items, width)).astype(np.float32)
    gallery[-1] = gallery[items // 2] = gallery[0]
    scores = _all_scores(rng.normal(size=(300, width)).astype(np.float32), gallery, 64)
    np.testing.assert_array_equal(scores[:, 0], scores[:, -1])
    np.testing.assert_array_equal(scores[:, 0], scores[:, items // 2])


def test_chunk_size_does_not_change_a_bit() -> None:
    rng = np.random.default_rng(0)
    queries, gallery = rng.normal(size=(2, 203, 65)).astype(np.float32)
    whole = _all_scores(queries, gallery, 1000)
    for chunk_size in (1, 19, 64):
        np.testing.assert_array_equal(_all_scores(queries, gallery, chunk_size), whole)


def test_top_k_is_a_stable_sort_of_the_cosines() -> None:
    rng = np.random.default_rng(1)
    queries, gallery = rng.normal(size=(9, 12)), rng.normal(size=(40, 12))
    gallery[30] = gallery[4]
    scores, items = top_k(queries, 5 * gallery, k=40, chunk_size=4)
    cosines = (queries / np.linalg.norm(queries, axis=1, keepdims=True)) @ (
        gallery / np.linalg.norm(gallery, axis=1, keepdims=True)
    ).T
    assert [list(row) for row in items] == [list(np.argsort(-row, kind="stable")) for row in np.round(cosines, 9)]
    np.testing.assert_allclose(scores, -np.sort(-cosines), atol=1e-6)
    few_scores, few_items = top_k(queries, gallery, k=3)
    np.testing.assert_array_equal(few_items, items[:, :3])
    assert few_scores.shape == (9, 3)


def test_what_cannot_be_searched_is_refused() -> None:
    rows = np.eye(4)
    with pytest.raises(ValueError, match=r"k: expected 1\.\.4.*received 5"):
        top_k(rows, rows, k=5)
    with pytest.raises(ValueError, match="queries have 4 dimensions and the gallery 3"):
        top_k(rows, np.eye(3), k=1)
    with pytest.raises(ValueError, match=r"chunk_size.*received 0"):
        top_k(rows, rows, k=1, chunk_size=0)

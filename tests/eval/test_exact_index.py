"""Scores and top-k lists against NumPy in float64, and the promise that equal rows have equal scores."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
import torch

from eval import top_k, top_k_of_scores
from eval.index import TILE_SIZE, score_chunks
from eval.inputs import BLOCK_SIZE, unit_rows


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


@pytest.mark.parametrize("items", [1, TILE_SIZE - 1, TILE_SIZE, TILE_SIZE + 1, 2 * TILE_SIZE + 1])
def test_each_score_is_that_of_its_two_rows_alone(items: int) -> None:
    rng = np.random.default_rng(items)
    queries, gallery = rng.normal(size=(2, 33)).astype(np.float32), rng.normal(size=(items, 33)).astype(np.float32)
    some = sorted({item for item in (0, 100, *range(TILE_SIZE - 2, TILE_SIZE + 2), items - 1) if item < items})
    alone = [[_all_scores(query[None], gallery[[item]], 1).item() for item in some] for query in queries]
    np.testing.assert_array_equal(_all_scores(queries, gallery, 2)[:, some], alone)


@pytest.mark.parametrize("width", [7, 100])
def test_copies_on_both_sides_of_a_tile_tie(width: int) -> None:
    rng = np.random.default_rng(width)
    gallery = rng.normal(size=(2 * TILE_SIZE + 3, width)).astype(np.float32)
    copies = [0, TILE_SIZE - 1, TILE_SIZE, 2 * TILE_SIZE - 1, 2 * TILE_SIZE, 2 * TILE_SIZE + 2]
    gallery[copies] = gallery[5]
    scores = _all_scores(rng.normal(size=(9, width)).astype(np.float32), gallery, 4)
    np.testing.assert_array_equal(scores[:, copies], np.repeat(scores[:, [5]], len(copies), axis=1))


def test_memory_is_that_of_one_chunk_of_scores() -> None:
    queries, gallery = np.ones((200, 2), np.float32), np.ones((20_000, 2), np.float32)
    assert (
        _peak(lambda: [None for _ in score_chunks(queries, gallery, chunk_size=100)]) < 2.5 * 4 * 100 * 20_000
    )  # the last chunk and this one


def test_memory_of_unit_rows_is_that_of_the_result() -> None:
    rows = np.ones((60_000, 64), np.float32)
    assert _peak(lambda: unit_rows(rows, "rows")) < 2 * rows.nbytes


def _peak(work: Callable[[], object]) -> int:
    """Bytes of arrays at once, of what NumPy allocates."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", ["C", "F", "torch"])
def test_unit_rows_are_those_of_a_row_alone(kind: str) -> None:
    """Neither blocks nor the layout change a bit."""
    rows = np.random.default_rng(0).normal(size=(2 * BLOCK_SIZE + 1, 50)).astype(np.float32)
    given = torch.from_numpy(rows) if kind == "torch" else np.asarray(rows, order=kind)
    found = unit_rows(given, "rows")
    some = [*range(0, len(rows), 97), BLOCK_SIZE - 1, BLOCK_SIZE, 2 * BLOCK_SIZE]
    for number in some:
        row = rows[number].astype(np.float64) / np.abs(rows[number].astype(np.float64)).max()
        np.testing.assert_array_equal(found[number], (row / np.sqrt((row * row).sum())).astype(np.float32))


def test_errors_count_the_rows_of_all_blocks() -> None:
    rows = np.ones((3 * BLOCK_SIZE, 2))
    rows[[0, BLOCK_SIZE, -1]] = np.nan
    rows[[1, -2]] = 0
    with pytest.raises(ValueError, match=f"3 of {len(rows)} rows hold NaN"):
        unit_rows(rows, "rows")
    with pytest.raises(ValueError, match=f"2 of {len(rows)} rows are all zeros"):
        unit_rows(np.nan_to_num(rows, nan=1.0), "rows")


@pytest.mark.parametrize("k", [1, 2, 5, 19, 20])
@pytest.mark.parametrize("values", [1, 2, 5, 1000])
def test_the_best_of_scores_full_of_ties_are_those_of_a_stable_sort(k: int, values: int) -> None:
    scores = np.random.default_rng(values).integers(values, size=(50, 20)).astype(np.float32)
    expected = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    best, items = top_k_of_scores(scores, k)
    np.testing.assert_array_equal(items, expected)
    np.testing.assert_array_equal(best, np.take_along_axis(scores, expected, axis=1))


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

"""Metrics against naive oracles: plain loops and binomials, every order of what ties, VSE++'s ranks without ties."""

from __future__ import annotations

from itertools import permutations
from math import comb

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eval import chance_level, retrieval_metrics, score_metrics, top_k_of_scores
from eval.ranks import Standings, answer_standings

KEYS = {f"{d}_{m}" for d in ("i2t", "t2i") for m in ("R@1", "R@5", "R@10", "MedR", "MeanR")} | {"rsum"}


def _naive_query(scores: np.ndarray, right: np.ndarray) -> tuple[float, dict[int, float]]:
    """Expected rank of the first right answer and P(it is among the first K), by counting with math.comb."""
    best = max(scores[right])
    above = sum(s > best for s in scores[~right])
    wrong_ties, right_ties = sum(s == best for s in scores[~right]), sum(s == best for s in scores[right])
    ties = wrong_ties + right_ties
    found = {
        k: 1 - comb(wrong_ties, places) / comb(ties, places)
        for k in (1, 5, 10)
        for places in [min(max(k - above, 0), ties)]
    }
    # P(the first right one is at place n of the ties): the other right ones are chosen from the places after it
    first = [comb(ties - n, right_ties - 1) / comb(ties, right_ties) for n in range(1, ties + 1)]
    return above + sum(n * p for n, p in enumerate(first, 1)), found


def _naive_metrics(scores: np.ndarray, owners: np.ndarray) -> dict[str, float]:
    """Metrics of image-by-text scores (N, M)."""
    right = owners[None, :] == np.arange(len(scores))[:, None]
    metrics = {}
    for direction, matrix, mask in (("i2t", scores, right), ("t2i", scores.T, right.T)):
        queries = [_naive_query(*pair) for pair in zip(matrix, mask, strict=True) if pair[1].any()]
        ranks = [rank for rank, _ in queries]
        metrics |= {f"{direction}_R@{k}": 100 * float(np.mean([found[k] for _, found in queries])) for k in (1, 5, 10)}
        metrics |= {f"{direction}_MedR": float(np.median(ranks)), f"{direction}_MeanR": float(np.mean(ranks))}
    return metrics | {"rsum": sum(value for key, value in metrics.items() if "R@" in key)}


def _ragged_owners(rng: np.random.Generator, images: int) -> np.ndarray:
    """One to six captions an image, in no order."""
    return rng.permutation(np.repeat(np.arange(images), rng.integers(1, 7, size=images)))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), images=st.integers(1, 25), chunk_size=st.integers(1, 40))
def test_agrees_with_the_definition_on_random_embeddings(seed: int, images: int, chunk_size: int) -> None:
    rng = np.random.default_rng(seed)
    owners = _ragged_owners(rng, images)
    vision, text = rng.normal(size=(images, 16)), rng.normal(size=(len(owners), 16))
    cosines = (vision / np.linalg.norm(vision, axis=1)[:, None]) @ (text / np.linalg.norm(text, axis=1)[:, None]).T
    assert retrieval_metrics(vision, text, owners, chunk_size=chunk_size) == pytest.approx(
        _naive_metrics(cosines, owners)
    )


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), images=st.integers(1, 12), places=st.integers(1, 4))
def test_agrees_with_the_definition_on_embeddings_full_of_ties(seed: int, images: int, places: int) -> None:
    rng = np.random.default_rng(seed)
    owners = _ragged_owners(rng, images)
    vision, text = rng.integers(places, size=images), rng.integers(places, size=len(owners))
    scores = (vision[:, None] == text[None, :]).astype(np.float64)  # the inner products of one-hot rows, exactly
    metrics = retrieval_metrics(np.eye(places)[vision], np.eye(places)[text], owners)
    assert metrics == pytest.approx(_naive_metrics(scores, owners))


def test_keys_and_range() -> None:
    metrics = retrieval_metrics(np.eye(12), np.eye(12), np.arange(12))
    assert set(metrics) == KEYS
    assert all(type(value) is float for value in metrics.values())
    assert metrics["rsum"] == 600
    assert all(metrics[f"{d}_{m}"] == 1 for d in ("i2t", "t2i") for m in ("MedR", "MeanR"))


@pytest.mark.parametrize("above", [0, 1, 3])
@pytest.mark.parametrize(("wrong", "right"), [(0, 1), (1, 1), (3, 1), (5, 1), (1, 2), (4, 2), (2, 4), (3, 3), (0, 5)])
def test_ties_are_the_mean_over_every_order(above: int, wrong: int, right: int) -> None:
    orders = np.array(list(permutations([False] * wrong + [True] * right)))
    ranks = above + 1 + orders.argmax(axis=1)
    standings = Standings(*(np.array([count]) for count in (above, wrong, right)))
    assert standings.expected_rank() == pytest.approx(ranks.mean())
    for k in range(1, above + wrong + right + 2):
        assert standings.found_by(k) == pytest.approx(np.mean(ranks <= k), abs=1e-15), k


@pytest.mark.parametrize("captions", [[1] * 8, [5] * 8, [1, 2, 3, 30]])
def test_equal_embeddings_score_at_chance(captions: list[int]) -> None:
    owners = np.repeat(np.arange(len(captions)), captions)
    metrics = retrieval_metrics(np.ones((len(captions), 3)), np.ones((len(owners), 3)), owners)
    level = chance_level(owners, len(captions))
    same = {key for key in level if key != "i2t_MedR"}  # a median of expectations is not the median of what may happen
    assert {key: metrics[key] for key in same} == pytest.approx({key: level[key] for key in same})


def test_a_sentence_that_is_there_twice_costs_half_a_hit() -> None:
    """As in MSR-VTT 1k-A: two videos with one sentence, which a perfect model cannot tell apart."""
    videos, sentences = np.eye(4), np.eye(4)
    videos[1] = videos[0] = sentences[1] = sentences[0]
    metrics = retrieval_metrics(videos, sentences, np.arange(4))
    assert metrics["t2i_R@1"] == metrics["i2t_R@1"] == 75
    assert metrics["t2i_MeanR"] == metrics["i2t_MeanR"] == 1.25


@pytest.mark.parametrize("images", [37, 503, 1025])
def test_duplicates_tie_at_sizes_that_do_not_fill_a_block(images: int) -> None:
    rows = np.random.default_rng(images).normal(size=(images, 64)).astype(np.float32)
    rows[-1] = rows[3]
    metrics = retrieval_metrics(rows, rows, np.arange(images))
    assert metrics["t2i_R@1"] == metrics["i2t_R@1"] == pytest.approx(100 * (images - 1) / images)
    assert metrics["t2i_MeanR"] == pytest.approx(1 + 2 * 0.5 / images)


@pytest.mark.parametrize(("ulps", "rank"), [(-1, 1.0), (0, 1.5), (1, 2.0)])
def test_a_wrong_answer_one_ulp_away(ulps: int, rank: float) -> None:
    """The query reads the first coordinate alone, so each score is a float32 of the gallery, without any rounding."""
    right = np.float32(0.6)
    gallery = np.array([[right, 0.8, 0], [right + ulps * np.spacing(right), 0, 0.8]], dtype=np.float32)
    query = np.array([[1, 0, 0]], dtype=np.float32)
    assert answer_standings(query, gallery, np.array([0]), np.array([0])).expected_rank() == [rank]


def test_image_to_text_is_the_convention_of_vse() -> None:
    """VSE++'s i2t, which takes the least position of images' five captions in the sorted list of all captions."""
    rng = np.random.default_rng(5)
    owners = np.repeat(np.arange(60), 5)
    vision = rng.normal(size=(60, 24))
    text = vision[owners] + 1.5 * rng.normal(size=(300, 24))
    vision, text = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (vision, text))
    ranks = np.zeros(60)
    for index in range(60):
        order = np.argsort(vision[index] @ text.T)[::-1]
        ranks[index] = min(np.where(order == caption)[0][0] for caption in range(5 * index, 5 * index + 5))
    metrics = retrieval_metrics(vision, text, owners)
    assert metrics["i2t_R@1"] == pytest.approx(100 * np.mean(ranks < 1)) and 0 < metrics["i2t_R@1"] < 100
    assert metrics["i2t_R@10"] == pytest.approx(100 * np.mean(ranks < 10))
    assert np.floor(metrics["i2t_MedR"]) == np.floor(np.median(ranks)) + 1
    assert metrics["i2t_MeanR"] == pytest.approx(ranks.mean() + 1)


def test_tensors_of_any_precision_and_rows_of_any_length() -> None:
    rng = np.random.default_rng(2)
    rows = torch.from_numpy(rng.integers(-8, 8, size=(30, 9)) + 0.5).to(torch.bfloat16)
    noise = torch.from_numpy(rng.integers(-8, 8, size=(30, 9)) + 0.5).to(torch.bfloat16)
    owners = torch.arange(30)
    expected = retrieval_metrics(rows.double().numpy(), noise.double().numpy(), owners.numpy())
    assert retrieval_metrics(rows.requires_grad_(), noise, owners) == expected
    integers = (2 * rows).to(torch.int16)
    assert retrieval_metrics(integers, noise.detach().double().numpy().astype(">f8"), owners) == expected
    with pytest.raises(ValueError, match=r"texts: expected real numbers; received torch\.complex64"):
        retrieval_metrics(rows, noise.to(torch.complex64), owners)
    scale = 2.0 ** torch.arange(-100, 110, 7)[:, None]  # powers of two: the same directions, bit for bit
    assert retrieval_metrics(rows.double() * scale, noise.double() / scale, owners) == expected


@pytest.mark.parametrize("seed", range(5))
def test_images_without_a_caption_are_asked_nothing_and_stay_in_the_gallery(seed: int) -> None:
    rng = np.random.default_rng(seed)
    owners = rng.choice(np.arange(0, 40, 2), size=30)  # of 40 images, half of the even ones or more have captions
    images, texts = np.eye(6)[rng.integers(6, size=40)], np.eye(6)[rng.integers(6, size=30)]
    expected = _naive_metrics(images @ texts.T, owners)
    assert retrieval_metrics(images, texts, owners, distractors=True) == pytest.approx(expected)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_broken_rows_are_refused_by_name_and_number(bad: float) -> None:
    broken = np.eye(4)
    broken[1:3, 0] = bad
    with pytest.raises(ValueError, match="images: 2 of 4 rows hold NaN or infinite"):
        retrieval_metrics(broken, np.eye(4), np.arange(4))
    with pytest.raises(ValueError, match="texts: 2 of 4 rows hold NaN or infinite"):
        retrieval_metrics(np.eye(4), broken, np.arange(4))


def test_zero_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="texts: 3 of 4 rows are all zeros"):
        retrieval_metrics(np.eye(4), np.diag([1.0, 0, 0, 0]), np.arange(4))


@pytest.mark.parametrize(
    ("images", "texts", "owners", "message"),
    [
        (np.eye(3), np.eye(3), [0, 0, 1], "1 of 3 images have no caption.*distractors=True"),
        (np.eye(3), np.eye(3), [0, 1, 3], r"1 of 3 entries are outside 0\.\.2"),
        (np.eye(3), np.eye(3), [0, 1, -1], r"1 of 3 entries are outside 0\.\.2"),
        (np.eye(3), np.eye(3), [0.0, 1.0, 2.0], "expected integers"),
        (np.eye(3), np.eye(3), [0, 1, 2, 2], "one entry for each of the 3 texts; received 4"),
        (np.eye(3), np.eye(4), [0, 1, 2, 2], "images have 3 dimensions and texts 4"),
        (np.ones(3), np.eye(3), [0, 1, 2], r"images: expected one embedding a row.*\(3,\)"),
        (np.ones((0, 3)), np.eye(3), [0, 1, 2], r"images: expected one embedding a row.*\(0, 3\)"),
    ],
)
def test_input_that_does_not_fit_together_is_refused(images, texts, owners, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        retrieval_metrics(images, texts, np.array(owners))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), images=st.integers(1, 12), values=st.integers(1, 50))
def test_scores_of_pairs_are_ranked_by_the_definition(seed: int, images: int, values: int) -> None:
    rng = np.random.default_rng(seed)
    owners = _ragged_owners(rng, images)
    scores = rng.integers(-values, values, size=(images, len(owners)))  # many ties
    for matrix in (scores, scores.astype(np.float32), scores * 1e-3):
        assert score_metrics(matrix, owners) == pytest.approx(_naive_metrics(matrix, owners))


def test_the_best_of_scores() -> None:
    scores, items = top_k_of_scores(np.array([[1.0, 3.0, 3.0], [0.0, -1.0, 2.0]]), 2)
    assert scores.tolist() == [[3, 3], [2, 0]] and items.tolist() == [[1, 2], [2, 0]]


@pytest.mark.parametrize(
    ("scores", "owners", "message"),
    [
        (np.zeros(3), [0, 1, 2], r"one row an image and one column a text; received shape \(3,\)"),
        (np.array([[1.0, np.nan]]), [0, 0], "1 of 2 are NaN or infinite"),
        (np.eye(3), [0, 1, 2, 2], "one entry for each of the 3 texts; received 4"),
        (np.eye(3), [0, 0, 1], "1 of 3 images have no caption"),
    ],
)
def test_scores_that_have_no_ranks_are_refused(scores, owners, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score_metrics(scores, np.array(owners))

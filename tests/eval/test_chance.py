"""The level of chance against every possible order of small galleries, and against random embeddings."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from eval import chance_level, retrieval_metrics


@pytest.mark.parametrize("owners", [[0, 1, 2], [0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 2, 0], [0, 0, 0]])
def test_every_order_of_a_small_gallery(owners: list[int]) -> None:
    owners_array = np.array(owners)
    images = owners_array.max() + 1
    orders = np.array(list(permutations(range(len(owners)))))
    ranks = np.concatenate([1 + np.argmax(owners_array[orders] == image, axis=1) for image in range(images)])
    level = chance_level(owners_array, images)
    for k in (1, 5, 10):
        assert level[f"i2t_R@{k}"] == pytest.approx(100 * np.mean(ranks <= k))
        assert level[f"t2i_R@{k}"] == pytest.approx(100 * min(k, images) / images)
    assert level["i2t_MeanR"] == pytest.approx(ranks.mean())
    assert level["i2t_MedR"] == pytest.approx(np.median(ranks))
    assert level["t2i_MeanR"] == level["t2i_MedR"] == (images + 1) / 2


def test_random_embeddings_score_the_level_of_chance() -> None:
    owners = np.repeat(np.arange(60), np.tile([1, 4, 5], 20))
    rng = np.random.default_rng(0)
    runs = [
        retrieval_metrics(rng.normal(size=(60, 32)), rng.normal(size=(len(owners), 32)), owners) for _ in range(200)
    ]
    level = chance_level(owners, 60)
    assert set(level) == set(runs[0])
    for key, expected in level.items():
        values = np.array([run[key] for run in runs])
        tolerance = 4.5 * values.std() / np.sqrt(len(runs)) + (0.02 * expected if key == "i2t_MedR" else 0)
        assert abs(values.mean() - expected) < tolerance, key


def test_the_level_for_flickr30k() -> None:
    level = chance_level(np.repeat(np.arange(1000), 5), 1000)
    assert level["t2i_R@10"] == pytest.approx(1)
    assert level["i2t_R@1"] == pytest.approx(0.1)
    assert level["i2t_MeanR"] == pytest.approx(5001 / 6)
    assert level["rsum"] == pytest.approx(sum(value for key, value in level.items() if "R@" in key))


def test_images_without_a_caption_are_refused_unless_they_are_meant() -> None:
    owners = np.array([0, 1, 2, 2])
    with pytest.raises(ValueError, match="2 of 5 images have no caption"):
        chance_level(owners, 5)
    level, without = chance_level(owners, 5, distractors=True), chance_level(owners, 3)
    assert level["t2i_R@1"] == pytest.approx(20) and level["t2i_MeanR"] == 3
    assert {k: v for k, v in level.items() if "i2t" in k} == {k: v for k, v in without.items() if "i2t" in k}

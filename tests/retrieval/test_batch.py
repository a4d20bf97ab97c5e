"""Pairs and augmentation: functions of seed, epoch and index, with the published rates."""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from small_clip import small_clip
from torch.utils.data import DataLoader
from transformers import BertConfig, BertModel

from retrieval.batch import Augmentation, Captions, Collate, TrainingPairs, collate_text
from retrieval.clip4clip import CLIP4Clip
from retrieval.model import RetrievalModel
from retrieval.vse_infty import VSEInfinity
from training.encoders import minilm

CAPTIONS = [
    "a fuel pump to the left of a microscope",
    "the unbelievably large octopus",
    "a cat",
    "a microscope",
    "two",
    "six",
]


class Data:
    captions = CAPTIONS
    image_of_caption = np.array([0, 0, 1, 0, 1, 2])

    def __len__(self) -> int:
        return 3

    def visual(self, index: int) -> np.ndarray:
        return np.arange(36, dtype=np.float32)[:, None].repeat(4, 1)


@pytest.fixture(scope="module")
def captions(cache: Path) -> Captions:
    return Captions(CAPTIONS, minilm(cache)[1])


def test_an_item_is_an_image_with_one_of_its_captions(captions: Captions) -> None:
    pairs = TrainingPairs(Data(), captions, pairing="image", augmentation=None, seed=0)
    drawn = Counter()
    for epoch in range(60):
        pairs.set_epoch(epoch)
        for index in range(len(pairs)):
            owner = captions.ids.index(pairs[index]["input_ids"])
            assert Data.image_of_caption[owner] == index
            drawn[owner] += 1
    assert set(drawn) == set(range(6)) and drawn[5] == 60
    each = TrainingPairs(Data(), captions, pairing="caption", augmentation=None, seed=0)
    assert [each[i]["input_ids"] for i in range(len(each))] == captions.ids


def test_the_same_seed_epoch_and_index_give_the_same_item(captions: Captions) -> None:
    def draw(seed: int, epoch: int) -> list[tuple[int, int]]:
        pairs = TrainingPairs(Data(), captions, pairing="caption", augmentation=Augmentation(), seed=seed)
        pairs.set_epoch(epoch)
        items = [pairs[i] for i in range(6)]
        return [(hash(tuple(item["input_ids"])), hash(item["visual"].tobytes())) for item in items]

    assert draw(0, 0) == draw(0, 0)
    assert draw(0, 0) != draw(0, 1) != draw(1, 1)


def test_items_of_an_epoch_are_augmented_each_in_its_own_way(cache: Path) -> None:
    """Six times the same sentence and the same regions, for which the same draws would give the same item."""
    captions = Captions(["two cats and a microscope"] * 6, minilm(cache)[1])
    pairs = TrainingPairs(Data(), captions, pairing="caption", augmentation=Augmentation(), seed=0)
    items = [pairs[index] for index in range(6)]
    assert len({tuple(item["visual"][:, 0]) for item in items}) == 6
    assert len({tuple(item["input_ids"]) for item in items}) > 1


def test_published_rates_of_augmentation(captions: Captions) -> None:
    """Of the words 10 % masked, 2 % replaced, 8 % deleted; of the regions 20 % dropped."""
    rng, counts, words = np.random.default_rng(0), Counter(), 0
    for _ in range(2000):
        ids = captions.augmented(0, 0.2, rng)
        assert ids[0] == captions.ids[0][0] and ids[-1] == captions.ids[0][-1]  # [CLS] and [SEP] stay
        counts["masked"] += ids.count(captions.mask_id)
        counts["replaced"] += sum(token not in {*captions.ids[0], captions.mask_id} for token in ids)
        counts["deleted"] += len(captions.ids[0]) - len(ids)
        words += len(captions.ids[0]) - 2
    assert counts["masked"] / words == pytest.approx(0.10, abs=0.01)
    assert counts["replaced"] / words == pytest.approx(0.02, abs=0.004)
    assert counts["deleted"] / words == pytest.approx(0.08, abs=0.01)
    pairs = TrainingPairs(Data(), captions, pairing="caption", augmentation=Augmentation(), seed=0)
    kept = []
    for epoch in range(200):
        pairs.set_epoch(epoch)
        kept.append(len(pairs[0]["visual"]))
    assert np.mean(kept) / 36 == pytest.approx(0.8, abs=0.02)


def test_the_pieces_of_a_word_share_their_fate_and_a_caption_is_never_emptied(captions: Captions) -> None:
    rng = np.random.default_rng(0)
    assert all(captions.augmented(2, 0.99, rng)[1:-1] for _ in range(200))
    long = [i for i, n in Counter(captions.words[1]).items() if i is not None and n > 1]
    assert long, "the sentence needs a word of several pieces"
    first, size = captions.words[1].index(long[0]), captions.words[1].count(long[0])
    pieces = captions.ids[1][first : first + size]
    for _ in range(300):
        ids = captions.augmented(1, 0.5, rng)
        present = [piece in ids for piece in pieces]
        assert all(present) or not any(present)


def test_collate_text_pads_with_zeros() -> None:
    batch = collate_text([[5, 6, 7], [8]])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["input_ids"].dtype == torch.int64


def test_a_split_may_hold_no_caption(cache: Path) -> None:
    assert Captions([], minilm(cache)[1], 32).ids == []


def test_bad_settings_are_refused(captions: Captions) -> None:
    with pytest.raises(ValueError, match="probabilities"):
        Augmentation(drop_regions=1.0)
    with pytest.raises(ValueError, match="pairing is 'images'"):
        TrainingPairs(Data(), captions, pairing="images", augmentation=None, seed=0)


def test_what_collates_is_sent_to_other_processes_without_the_model() -> None:
    """Where processes that load data are spawned (macOS, Windows, Python 3.14), they are sent it as a pickle."""
    bert = BertModel(BertConfig(vocab_size=10, hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    rng = np.random.default_rng(0)
    models: list[tuple[RetrievalModel, list[np.ndarray]]] = [
        (VSEInfinity(bert, 4), [rng.standard_normal((count, 4), dtype=np.float32) for count in (3, 1)]),
        (CLIP4Clip(small_clip()), [rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8) for count in (0, 2)]),
    ]
    for model, visual in models:
        items = [{"visual": item, "input_ids": [1, 2][: 1 + number]} for number, item in enumerate(visual)]
        collate = Collate(model.collate_visual, model.text_length)
        assert len(pickle.dumps(collate)) < 10_000
        expected, (batch,) = collate(items), DataLoader(items, 2, collate_fn=pickle.loads(pickle.dumps(collate)))
        assert batch.keys() == expected.keys()
        assert all(torch.equal(batch[name], expected[name]) for name in batch)

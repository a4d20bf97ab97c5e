"""A split through a model: every image once, or once for each caption as the published code has it."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from retrieval.evaluate import encode
from retrieval.model import RetrievalModel

IMAGES, CAPTIONS, WIDTH = 7, 21, 5


class Split:
    """Seven images; three captions each, in no order."""

    split = "test"
    captions = tuple(f"caption {number}" for number in range(CAPTIONS))
    image_of_caption = np.random.default_rng(0).permutation(np.arange(CAPTIONS) % IMAGES)

    def __len__(self) -> int:
        return IMAGES

    def visual(self, index: int) -> np.ndarray:
        return np.full(WIDTH, 1.0, np.float32) + np.eye(IMAGES, WIDTH, dtype=np.float32)[index]


class Model(RetrievalModel):
    """Its towers are fixed maps; `encoded` counts what went through the visual one."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(WIDTH))
        self.encoded = 0

    def collate_visual(self, items: Sequence[np.ndarray]) -> dict[str, Tensor]:
        return {"values": torch.from_numpy(np.stack(items))}

    def encode_visual(self, values: Tensor) -> Tensor:
        self.encoded += len(values)
        return values * self.scale

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(input_ids[:, 0], WIDTH).float()


@pytest.mark.parametrize("batch_size", [2, 64])
def test_an_image_for_each_caption_changes_no_embedding(batch_size: int) -> None:
    captions = SimpleNamespace(ids=[[number % WIDTH] for number in range(CAPTIONS)])
    found = {}
    for each, expected in ((False, IMAGES), (True, CAPTIONS)):
        model = Model()
        model.image_for_each_caption = each
        found[each] = encode(model, Split(), captions, batch_size=batch_size)
        assert model.encoded == expected
    np.testing.assert_array_equal(found[True].images, found[False].images)
    np.testing.assert_array_equal(found[False].images, np.stack([Split().visual(image) for image in range(IMAGES)]))
    np.testing.assert_array_equal(found[True].texts, found[False].texts)


def test_a_split_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="the validation split holds nothing"):
        encode(
            Model(), type("Nothing", (), {"split": "validation", "__len__": lambda self: 0})(), SimpleNamespace(ids=[])
        )


class Empty(Split):
    """Its third image holds nothing."""

    def visual(self, index: int) -> np.ndarray:
        return super().visual(index) * (index != 2)


class PairModel(Model):
    """Scores pairs by a distance, so that nothing is nearer than zeros are."""

    def __init__(self) -> None:
        super().__init__()
        self.pair_scores = lambda texts, images: -torch.cdist(texts, images)


def test_what_holds_nothing_is_last_where_pairs_are_scored(capsys: pytest.CaptureFixture) -> None:
    captions = SimpleNamespace(ids=[[number % WIDTH] for number in range(CAPTIONS)])
    encoded = encode(PairModel(), Empty(), captions)
    others = np.arange(IMAGES) != 2
    expected = -np.linalg.norm(encoded.images[others, None] - encoded.texts, axis=-1)
    np.testing.assert_allclose(encoded.scores[others], expected, rtol=1e-6)
    assert (encoded.scores[2] < encoded.scores[others].min()).all() and np.isfinite(encoded.scores).all()
    assert "1 of 7 test items hold nothing" in capsys.readouterr().out
    assert 2 not in encoded.top_k(np.arange(CAPTIONS), IMAGES - 1)[1]
    assert encoded.metrics(Split.image_of_caption)["t2i_MeanR"] > 1

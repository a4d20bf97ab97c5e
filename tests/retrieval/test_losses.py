"""The contrastive losses against numpy loops, and VSE-infinity's published sizes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import BertConfig, BertModel

from adapters import LoRA, inject, trainable_parameters
from retrieval.losses import LOSSES, InfoNCE, TripletLoss
from retrieval.vse_infty import VSEInfinity


def pairs(count: int = 6) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {side: F.normalize(torch.randn(count, 5, dtype=torch.float64), dim=-1) for side in ("visual", "text")}


@pytest.mark.parametrize("epoch", [0.5, 1.0])
def test_triplet_is_the_hinge_over_all_then_over_the_hardest(epoch: float) -> None:
    outputs = pairs()
    scores = (outputs["visual"] @ outputs["text"].T).numpy()
    total = 0.0
    for b in range(6):
        texts = [max(0.0, 0.3 + scores[b, n] - scores[b, b]) for n in range(6) if n != b]
        images = [max(0.0, 0.3 + scores[n, b] - scores[b, b]) for n in range(6) if n != b]
        total += sum(texts) + sum(images) if epoch < 1 else max(texts) + max(images)
    assert float(TripletLoss(margin=0.3)(outputs, epoch)["triplet"]) == pytest.approx(total, rel=1e-12)


def test_triplet_of_a_collapsed_model_is_twice_the_batch_times_the_margin() -> None:
    same = torch.ones(8, 3) / 3**0.5
    assert float(TripletLoss()({"visual": same, "text": same}, 5.0)["triplet"]) == pytest.approx(2 * 8 * 0.2, rel=1e-5)


@pytest.mark.parametrize("learned", [False, True])
def test_info_nce_is_the_symmetric_cross_entropy(learned: bool) -> None:
    outputs = pairs()
    scale = 7.0 if learned else 1 / 0.1
    logits = scale * (outputs["text"] @ outputs["visual"].T).numpy()
    over_visual = np.mean([np.log(np.exp(row).sum()) - row[i] for i, row in enumerate(logits)])
    over_text = np.mean([np.log(np.exp(row).sum()) - row[i] for i, row in enumerate(logits.T)])
    if learned:
        outputs["logit_scale"] = torch.tensor(7.0)
    value = InfoNCE(temperature=0.1)(outputs, 0.0)["info_nce"]
    assert float(value) == pytest.approx((over_visual + over_text) / 2, rel=1e-12)
    assert set(LOSSES) == {"triplet", "info_nce"}


@pytest.mark.parametrize("epoch", [0.0, 2.0])
@pytest.mark.parametrize("loss", [InfoNCE(), TripletLoss()])
def test_a_pair_that_is_not_valid_is_as_if_it_were_not_there(loss: Any, epoch: float) -> None:
    """Value and gradients are those of the batch without it; its own gradient is zero."""
    kept = torch.tensor([True, False, True, True, False, True])
    whole, less = pairs(), pairs()
    whole["visual"][~kept] = 0.0  # as a clip without frames is embedded
    for outputs in (whole, less):
        for side in ("visual", "text"):
            outputs[side].requires_grad_()
    (value,) = loss(whole | {"valid": kept}, epoch).values()
    (expected,) = loss({side: tensor[kept] for side, tensor in less.items()}, epoch).values()
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    value.backward()
    expected.backward()
    for side in ("visual", "text"):
        torch.testing.assert_close(whole[side].grad[kept], less[side].grad[kept])
        assert (whole[side].grad[~kept] == 0).all()


@pytest.mark.parametrize("loss", [InfoNCE(), TripletLoss(warmup_epochs=0)])
@pytest.mark.parametrize("valid", [[False, False], [True, False]])
def test_a_batch_of_one_valid_pair_or_none_has_no_loss(loss: Any, valid: list[bool]) -> None:
    outputs = {side: torch.randn(2, 4, requires_grad=True) for side in ("visual", "text")}
    (value,) = loss(outputs | {"valid": torch.tensor(valid)}, 1.0).values()
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-6)
    assert all(outputs[side].grad.abs().max() < 1e-5 for side in outputs)


def test_scores_that_a_model_brings_are_taken() -> None:
    outputs = pairs()
    scores = outputs["text"] @ outputs["visual"].T
    brought = {"visual": torch.zeros(6, 2), "text": torch.zeros(6, 2), "by_text": scores, "by_visual": scores.T}
    for loss in (InfoNCE(), TripletLoss()):
        assert float(*loss(brought, 2.0).values()) == pytest.approx(float(*loss(outputs, 2.0).values()))


def test_published_sizes_of_vse_infinity() -> None:
    """Region encoder 3,688,352 of which 2,048 are a batch norm that prior code builds and never uses; text head
    800,160;
    with LoRA q, v at rank 8 on BERT-base and the projection alone the 1,082,368 of Table 1."""
    with torch.device("meta"):
        model = VSEInfinity(BertModel(BertConfig(), add_pooling_layer=False), d_region=2048)
    assert sum(p.numel() for p in model.image.parameters()) == 3_688_352 - 2_048
    assert sum(p.numel() for p in model.text.parameters()) == 108_891_648 + 787_456 + 12_704
    assert trainable_parameters(inject(model, LoRA(), train=("text.linear",))) == 1_082_368


def test_padding_changes_neither_embeddings_nor_batch_statistics() -> None:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    model = VSEInfinity(BertModel(config, add_pooling_layer=False), d_region=8).eval()
    model.image.mlp[1].momentum = None  # cumulative statistics: comparable over calls
    regions = [torch.randn(k, 8).numpy() for k in (5, 2, 3)]
    together = model.collate_visual(regions)
    assert together["regions"].shape == (3, 5, 8) and together["region_lengths"].tolist() == [5, 2, 3]
    alone = torch.cat([model.encode_visual(**model.collate_visual([item])) for item in regions])
    torch.testing.assert_close(model.encode_visual(**together), alone, atol=1e-5, rtol=1e-4)
    model.train()
    model.encode_visual(**together)
    flat = torch.cat([torch.from_numpy(item) for item in regions])
    torch.testing.assert_close(model.image.mlp[1].running_mean, model.image.mlp[0](flat).mean(0), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("loss", "settings"),
    [(InfoNCE, {"temperature": 0.0}), (InfoNCE, {"temperature": float("nan")}), (TripletLoss, {"margin": -0.1}),
     (TripletLoss, {"warmup_epochs": -1.0})],
)  # fmt: skip
def test_settings_that_cannot_train_are_refused(loss: type, settings: dict[str, float]) -> None:
    (name, value) = next(iter(settings.items()))
    with pytest.raises(ValueError, match=rf"{name}.*{value}"):
        loss(**settings)

"""The contrastive losses against numpy loops, and VSE-infinity's published sizes."""

from __future__ import annotations

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

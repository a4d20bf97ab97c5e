"""The heads of CLIP4Clip against loops over items, frames and pairs; how they start; where an adapter goes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from small_clip import away_from_zero, clips, sentences, small_clip, torchs_layer
from torch import nn
from torch.nn import functional as F

from adapters import Full, LoRA, adapter_parameter_names, inject
from retrieval.clip4clip import CLIP4Clip, tight_transformer
from retrieval.clip4clip.frame_lstm import FrameLSTM
from retrieval.clip4clip.frame_transformer import FrameTransformer
from retrieval.clip4clip.head_block import HeadBlock
from retrieval.clip4clip.tight_transformer import TightTransformer
from retrieval.evaluate import Encoded
from training.optimizers import LearningRates, parameter_groups


@pytest.fixture
def clip() -> nn.Module:
    return small_clip()


def features(batch: int = 3, length: int = 5, width: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """Frames of 5, 3 and no real positions."""
    frames = torch.randn(batch, length, width, generator=torch.Generator().manual_seed(0))
    return frames, torch.arange(length) < torch.tensor([5, 3, 0])[:, None]


def test_frame_lstm_is_the_cell_frame_by_frame_plus_the_frame() -> None:
    torch.manual_seed(0)
    model = FrameLSTM(128)
    frames, mask = features()
    weights = {name: value.detach().double().numpy() for name, value in model.lstm.named_parameters()}
    with torch.no_grad():
        output = model(frames, mask)
    for item, real, row in zip(frames.double().numpy(), mask, output, strict=True):
        hidden, cell = np.zeros(128), np.zeros(128)
        for frame, result in zip(item[real], row[real], strict=True):
            gates = weights["weight_ih_l0"] @ frame + weights["bias_ih_l0"]
            gates = np.split(gates + weights["weight_hh_l0"] @ hidden + weights["bias_hh_l0"], 4)
            entered, kept, shown = (1 / (1 + np.exp(-gates[i])) for i in (0, 1, 3))
            cell = kept * cell + entered * np.tanh(gates[2])
            hidden = shown * np.tanh(cell)
            np.testing.assert_allclose(result.numpy(), hidden + frame, atol=1e-5)
    torch.testing.assert_close(output[~mask], 2 * frames[~mask])  # the tail is filled with the input


def test_frame_lstm_wants_real_frames_first() -> None:
    with pytest.raises(ValueError, match="padding before real frames"):
        FrameLSTM(4)(torch.ones(1, 3, 4), torch.tensor([[True, False, True]]))


def test_frame_transformer_is_a_pre_norm_transformer() -> None:
    torch.manual_seed(0)
    model = FrameTransformer(128, max_frames=6)
    away_from_zero(model)
    frames, mask = features()
    for item, real, row in zip(frames, mask, model(frames, mask), strict=True):
        if real.any():
            hidden = (item[real] + model.positions.weight[: int(real.sum())])[None]
            for block in model.blocks:
                hidden = torchs_layer(block)(hidden)
            torch.testing.assert_close(row[real], item[real] + hidden[0], atol=1e-4, rtol=1e-4)
        assert row.isfinite().all()


def test_tight_transformer_is_a_transformer_over_each_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tight_transformer, "PAIRS", 4)  # blocks of one sentence, and a last one
    torch.manual_seed(0)
    model = TightTransformer(128, max_frames=6).eval()
    away_from_zero(model)
    frames, mask = features()
    texts = torch.randn(4, 128)
    with torch.no_grad():
        scores = model(texts, frames.masked_fill(~mask[..., None], 0.0))
    assert scores.shape == (4, 3)
    layers = [torchs_layer(block) for block in model.blocks]
    for i, text in enumerate(texts):
        for j in range(3):
            tokens = torch.cat([text[None], frames[j][mask[j]]])  # no padding at all
            hidden = (tokens + model.positions.weight[: len(tokens)])[None]
            for layer in layers:
                hidden = layer(hidden)
            first = F.layer_norm(hidden[0, 0], (128,), model.pool_norm.weight, model.pool_norm.bias, 1e-12)
            pooled = model.pool.weight @ first + model.pool.bias
            pooled = pooled / (1 + torch.exp(-1.702 * pooled))
            expected = model.score.weight[0] @ pooled + model.score.bias[0]
            assert scores[i, j].item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-4)


def test_tight_transformer_trains_in_blocks_with_the_gradients_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients = []
    for pairs in (1000, 3):
        monkeypatch.setattr(tight_transformer, "PAIRS", pairs)
        torch.manual_seed(0)
        model = TightTransformer(64, max_frames=5, layers=2, dropout=0.0)
        frames, mask = features(width=64)
        text = torch.randn(3, 64, requires_grad=True)
        model(text, frames.masked_fill(~mask[..., None], 0.0)).square().sum().backward()
        gradients.append([text.grad, *(parameter.grad for parameter in model.parameters())])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("head", ["seqTransf", "tightTransf"])
def test_heads_start_from_clips_text_tower(clip: nn.Module, head: str) -> None:
    model = CLIP4Clip(clip, head=head, max_frames=12)
    of_head = model.frame_head or model.pair_scores
    rows = 13 if head == "tightTransf" else 12
    assert len(of_head.blocks) == 4
    torch.testing.assert_close(of_head.positions.weight, clip.positional_embedding[:rows])
    hidden = torch.randn(2, 6, 64)
    for block, theirs in zip(of_head.blocks, clip.transformer.resblocks, strict=False):
        with torch.no_grad():
            theirs.ln_1.eps = theirs.ln_2.eps = 1e-12
            torch.testing.assert_close(block(hidden, torch.ones(2, 6, dtype=torch.bool)), theirs(hidden))
        assert block.expand.weight is not theirs.mlp.c_fc.weight
        assert block.ln_1.eps == block.ln_2.eps == 1e-12


def test_heads_of_another_width_start_at_random(clip: nn.Module) -> None:
    block = HeadBlock(128)
    before = {name: value.clone() for name, value in block.state_dict().items()}
    block.from_open_clip(clip.transformer.resblocks[0])
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())
    with pytest.raises(ValueError, match="multiple of 64"):
        HeadBlock(200)


def test_tight_scores_in_the_model(clip: nn.Module) -> None:
    """Raw features go in, padded clips score as unpadded ones, an item without frames is finite and not valid."""
    model = CLIP4Clip(clip, head="tightTransf").eval()
    frames, mask = clips()
    mask[1] = False
    ids = sentences()
    with torch.no_grad():
        output = model(frames, mask, ids)
        text = clip.encode_text(ids)
        torch.testing.assert_close(output["text"], text)
        for j in (0, 2):
            alone = clip.encode_image(frames[j][mask[j]])
            torch.testing.assert_close(
                output["by_text"][:, j], model.pair_scores(text, alone[None])[:, 0], atol=1e-5, rtol=1e-4
            )
    torch.testing.assert_close(output["by_visual"], output["by_text"].T)
    assert output["valid"].tolist() == [True, False, True] and output["logit_scale"] == 1
    assert output["by_text"].isfinite().all()


@pytest.mark.parametrize("head", ["meanP", "seqLSTM", "seqTransf", "tightTransf"])
def test_an_adapter_goes_into_the_towers_and_keeps_its_learning_rate(clip: nn.Module, head: str) -> None:
    """In prior code an adapter inside "clip." fell into the group of 1e-7."""
    model = CLIP4Clip(clip, head=head)
    inject(model, LoRA(rank=2, targets=("q", "v", "fc1")), train=model.heads)
    own = adapter_parameter_names(model)
    assert own and all(name.startswith("clip.") for name in own)
    rates = LearningRates(adapter=1e-4, head=2e-4, backbone=1e-7, weight_decay=0.2)
    rate_of = {id(p): g["lr"] for g in parameter_groups(model, rates, model.heads) for p in g["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert rate_of[id(parameter)] == (1e-4 if name in own else 2e-4), name


def test_full_fine_tuning_at_clip4clips_rates(clip: nn.Module) -> None:
    """All that is CLIP's at 1e-7, its projections and logit scale too; what is new at the head's rate."""
    model = CLIP4Clip(clip, head="seqTransf", projections="backbone")
    inject(model, Full(), train=model.heads)
    rates = LearningRates(adapter=1e-4, head=2e-4, backbone=1e-7)
    rate_of = {id(p): g["lr"] for g in parameter_groups(model, rates, model.heads) for p in g["params"]}
    for name, parameter in model.named_parameters():
        assert rate_of[id(parameter)] == (1e-7 if name.startswith("clip.") else 2e-4), name


def test_the_logit_scale_never_exceeds_100(clip: nn.Module) -> None:
    model = CLIP4Clip(clip)
    with torch.no_grad():
        clip.logit_scale.fill_(7.0)
    inject(model, LoRA(rank=2))
    model.after_step()
    assert clip.logit_scale == 7.0, "frozen, it is left alone"
    clip.logit_scale.requires_grad_(True)
    model.after_step()
    assert float(clip.logit_scale) == pytest.approx(math.log(100))


def test_encoded_scores_are_searched_as_embeddings_are() -> None:
    rng = np.random.default_rng(0)
    images, texts = (rng.normal(size=(n, 6)).astype(np.float32) for n in (7, 9))
    images, texts = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (images, texts))
    owners = np.array([0, 1, 2, 3, 4, 5, 6, 0, 1])
    by_embedding, by_score = Encoded(images, texts), Encoded(images, texts, images @ texts.T)
    assert by_embedding.metrics(owners) == pytest.approx(by_score.metrics(owners))
    for one, other in zip(by_embedding.top_k(np.array([1, 4]), 3), by_score.top_k(np.array([1, 4]), 3), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)

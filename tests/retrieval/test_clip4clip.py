from __future__ import annotations

from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from small_clip import clips, registered, small_clip
from torch import nn
from torch.nn import functional
from torchvision.transforms import Normalize, ToTensor

from retrieval.clip4clip import CLIP4Clip, normalise_frames
from retrieval.clip4clip.towers import cut_context, embedded_clip, open_clip_tower

HEADS = ["meanP", "seqLSTM", "seqTransf"]


@pytest.fixture(scope="module")
def tiny() -> str:
    return registered()


@pytest.fixture
def clip() -> nn.Module:
    return small_clip()


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x)


def test_mean_pooling_by_hand(clip: nn.Module) -> None:
    frames, mask = clips()
    with torch.no_grad():
        embedded = CLIP4Clip(clip).encode_visual(frames, mask).numpy()
        for row, item, real in zip(embedded, frames, mask, strict=True):
            features = [unit(clip.encode_image(frame[None])[0].numpy()) for frame in item[real]]
            np.testing.assert_allclose(row, unit(np.mean(features, axis=0)), atol=1e-6)


def test_text_by_hand(clip: nn.Module) -> None:
    tokens = open_clip.get_tokenizer("ViT-B-32", context_length=16)(["a dog spinning", "an owl"])
    shorter = tokens[:, : int((tokens != 0).sum(dim=1).max())]  # as a batch is padded
    with torch.no_grad():
        expected = [unit(row) for row in clip.encode_text(tokens).numpy()]
        np.testing.assert_allclose(CLIP4Clip(clip).encode_text(shorter).numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("head", HEADS)
def test_outputs(clip: nn.Module, head: str) -> None:
    frames, mask = clips()
    output = CLIP4Clip(clip, head=head)(frames, mask, torch.randint(1, 100, (3, 16)))
    assert output["visual"].shape == output["text"].shape == (3, 64)
    for side in ("visual", "text"):
        torch.testing.assert_close(output[side].norm(dim=1), torch.ones(3))
    assert output["logit_scale"].shape == ()
    assert output["logit_scale"].item() == pytest.approx(1 / 0.07)


@pytest.mark.parametrize("head", HEADS)
def test_an_item_without_frames(clip: nn.Module, head: str) -> None:
    model = CLIP4Clip(clip, head=head)
    frames, mask = clips()
    mask[1] = False
    output = model(frames, mask, torch.randint(1, 100, (3, 16)))
    assert (output["visual"][1] == 0).all()
    (output["logit_scale"] * output["text"] @ output["visual"].T).exp().sum().log().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert len(gradients) > 20
    assert all(gradient.isfinite().all() and gradient.abs().max() < 1e3 for gradient in gradients)


def test_a_batch_without_frames(clip: nn.Module) -> None:
    frames, mask = clips()
    assert (CLIP4Clip(clip).encode_visual(frames, torch.zeros_like(mask)) == 0).all()


@pytest.mark.parametrize("head", HEADS)
def test_padding_changes_nothing(clip: nn.Module, head: str) -> None:
    model = CLIP4Clip(clip, head=head)
    frames, mask = clips(batch=2)
    with torch.no_grad():
        expected = torch.cat(
            [model.encode_visual(item[None, real], real[real][None]) for item, real in zip(frames, mask, strict=True)]
        )
        frames[~mask] = float("nan")
        longer = functional.pad(frames, (0, 0, 0, 0, 0, 0, 0, 3), value=7.0)
        torch.testing.assert_close(
            model.encode_visual(longer, functional.pad(mask, (0, 3))), expected, atol=1e-6, rtol=0
        )


def test_only_the_sequence_head_sees_order(clip: nn.Module) -> None:
    frames, mask = clips(batch=1)
    for head, sees in (("meanP", False), ("seqLSTM", True), ("seqTransf", True)):
        model = CLIP4Clip(clip, head=head)
        with torch.no_grad():
            change = (model.encode_visual(frames, mask) - model.encode_visual(frames.flip(1), mask)).abs().max()
        assert change > 1e-4 if sees else change < 1e-6


def test_heads_are_what_is_not_a_tower(clip: nn.Module) -> None:
    assert CLIP4Clip(clip).heads == ("clip.visual.proj", "clip.text_projection", "clip.logit_scale")
    for head in ("seqLSTM", "seqTransf"):
        assert CLIP4Clip(clip, head=head).heads[-1] == "frame_head"
    assert CLIP4Clip(clip, head="tightTransf").heads == ("clip.visual.proj", "clip.text_projection", "pair_scores")
    assert CLIP4Clip(clip, head="seqLSTM", projections="backbone").heads == ("frame_head",)


def test_errors(clip: nn.Module) -> None:
    with pytest.raises(ValueError, match="meanP, seqLSTM, seqTransf, tightTransf"):
        CLIP4Clip(clip, head="meanp")
    with pytest.raises(ValueError, match="expected one of head, backbone"):
        CLIP4Clip(clip, projections="frozen")
    frames, mask = clips()
    for head in ("seqTransf", "tightTransf"):
        with pytest.raises(ValueError, match="max_frames is 3"):
            CLIP4Clip(clip, head=head, max_frames=3).encode_visual(frames, mask)
    with pytest.raises(ValueError, match="uint8"):
        normalise_frames(frames, (0, 0, 0), (1, 1, 1))
    with pytest.raises(ValueError, match=r"data\.size=32"):
        CLIP4Clip(clip).collate_visual([np.zeros((2, 56, 56, 3), np.uint8)])


def test_normalise_frames() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, 3, 5, 4, 3), dtype=np.uint8)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 0.125)
    expected = np.moveaxis((frames / 255 - np.array(mean)) / np.array(std), -1, 2)
    normalised = normalise_frames(torch.from_numpy(frames), mean, std)
    assert normalised.dtype == torch.float32
    np.testing.assert_allclose(normalised.numpy(), expected, atol=1e-5)


def test_collate_visual(clip: nn.Module) -> None:
    rng = np.random.default_rng(0)
    items = [rng.integers(0, 256, (length, 32, 32, 3), dtype=np.uint8) for length in (2, 4, 1)]
    batch = CLIP4Clip(clip).collate_visual(items)
    assert batch["frames"].shape == (3, 4, 32, 32, 3) and batch["frames"].dtype == torch.uint8
    assert batch["frame_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]
    for item, row, mask in zip(items, batch["frames"], batch["frame_mask"], strict=True):
        np.testing.assert_array_equal(row[mask], item)
        assert (row[~mask] == 0).all()


@pytest.mark.parametrize("head", HEADS)
def test_pixels_are_normalised_by_the_model(clip: nn.Module, head: str) -> None:
    """As CLIP's own preprocessing (ToTensor and Normalize), to the same bits as from such frames."""
    to_tensor, normalize = ToTensor(), Normalize(clip.visual.image_mean, clip.visual.image_std)
    rng, model = np.random.default_rng(0), CLIP4Clip(clip, head=head)
    items = [rng.integers(0, 256, (length, 32, 32, 3), dtype=np.uint8) for length in (2, 0, 4)]
    batch = model.collate_visual(items)
    frames = torch.zeros(3, 4, 3, 32, 32)
    for row, item in zip(frames, items, strict=True):
        for position, frame in enumerate(item):
            row[position] = normalize(to_tensor(frame))
    with torch.no_grad():
        expected = model.encode_visual(frames, batch["frame_mask"])
        assert torch.equal(model.encode_visual(**batch), expected) and expected[2].any()


def test_collate_visual_takes_clips_without_frames(clip: nn.Module) -> None:
    empty, full = np.zeros((0, 32, 32, 3), np.uint8), np.ones((2, 32, 32, 3), np.uint8)
    model = CLIP4Clip(clip)
    batch = model.collate_visual([empty, full])
    assert batch["frame_mask"].tolist() == [[0, 0], [1, 1]] and (batch["frames"][0] == 0).all()
    nothing = model.collate_visual([empty, empty])
    assert nothing["frames"].shape == (2, 1, 32, 32, 3) and not nothing["frame_mask"].any()
    for head in HEADS:
        assert (CLIP4Clip(clip, head=head).encode_visual(**nothing) == 0).all()


def test_cut_context_keeps_features_of_short_sentences(tiny: str) -> None:
    torch.manual_seed(0)
    whole = open_clip.create_model(tiny).eval()
    tokens = open_clip.get_tokenizer(tiny)(["a dog", "an owl spinning"])
    with torch.no_grad():
        expected = whole.encode_text(tokens)
        cut_context(whole, 16)
        torch.testing.assert_close(whole.encode_text(tokens[:, :16]), expected, atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="16 positions"):
        cut_context(whole, 77)


@pytest.mark.parametrize("name", ["hf-hub:someone/something", "ViT-B-31"])
def test_unknown_architectures(name: str) -> None:
    with pytest.raises(ValueError, match="unknown architecture"):
        open_clip_tower(name, None)


def test_embedded_clip_is_its_two_towers(cache: Path) -> None:
    from training.encoders import dinov2_small, minilm

    torch.manual_seed(0)
    clip, tokenizer = embedded_clip(cache, image_size=56)
    model = CLIP4Clip(clip, head="seqTransf")
    assert model.heads == ("clip.visual.head", "clip.text.proj", "clip.logit_scale", "frame_head")
    images = np.random.default_rng(0).integers(0, 256, (2, 56, 56, 3), dtype=np.uint8)
    frames = normalise_frames(torch.from_numpy(images)[None], clip.visual.image_mean, clip.visual.image_std)
    encoded = tokenizer(["an owl spinning", "a dog"], padding=True, return_tensors="pt")
    bert, _ = minilm(cache)
    with torch.no_grad():
        trunk = dinov2_small(cache, 56)(frames[0])  # (2, 384), the class token after the last norm
        features = clip.encode_image(frames[0])
        assert features.shape == (2, 256)
        torch.testing.assert_close(features, trunk @ clip.visual.head.proj.weight.T, atol=1e-4, rtol=1e-4)
        states = bert(**encoded).last_hidden_state
        mask = encoded["attention_mask"].unsqueeze(-1)
        pooled = (states * mask).sum(dim=1) / mask.sum(dim=1)
        sentences = clip.encode_text(encoded["input_ids"])
        torch.testing.assert_close(sentences, pooled @ clip.text.proj.weight.T, atol=1e-4, rtol=1e-4)
        output = model(frames, torch.ones(1, 2), encoded["input_ids"][:1], encoded["attention_mask"][:1])
    assert output["visual"].shape == (1, 256)

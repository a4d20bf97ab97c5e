"""A cut ViT is the whole ViT: cached tokens and the trained end give timm's own forward pass."""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from timm.models import VisionTransformer

from adapters import ADAPTERS, Full, Linear, LoRA, inject, trainable_parameters
from classification.models import build_model, split_vit
from classification.tokens import cached_tokens
from training.encoders import dinov2_small


class Pictures:
    """Nine random pictures of two classes."""

    name = "pictures"
    classes = ("a", "b")
    preprocessing = "none"
    labels = np.arange(9) % 2
    splits = {"train": np.arange(6), "validation": np.array([6]), "test": np.array([7, 8])}  # noqa: RUF012
    fingerprint = "pictures"

    def images(self, indices: np.ndarray) -> torch.Tensor:
        return torch.randn(9, 3, 28, 28, generator=torch.Generator().manual_seed(0))[torch.as_tensor(indices)]


def small_vit() -> VisionTransformer:
    """DINOv2's architecture (layer scale, patch 14), four blocks of 48; random weights that matter everywhere."""
    torch.manual_seed(0)
    vit = timm.create_model(
        "vit_small_patch14_dinov2", img_size=28, embed_dim=48, depth=4, num_heads=3, num_classes=2
    ).eval()
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return vit


@pytest.mark.parametrize("frozen_blocks", [0, 1, 3])
def test_tokens_and_end_are_the_whole_model(frozen_blocks: int, tmp_path: Path) -> None:
    """Oracle: timm's forward of the uncut model. The cache gives the same bits again."""
    data, vit = Pictures(), small_vit()
    head = {name: tensor.clone() for name, tensor in vit.head.state_dict().items()}
    with torch.inference_mode():
        expected = vit(data.images(np.arange(9)))
    total = sum(parameter.numel() for parameter in vit.parameters())
    frozen, end = split_vit(vit, frozen_blocks, classes=2)
    end.head.load_state_dict(head)
    for _ in range(2):
        tokens = torch.from_numpy(np.load(cached_tokens(data, frozen, tmp_path)))
        with torch.inference_mode():
            logits = end(tokens)["logits"]
        assert tokens.shape == (9, 5, 48) and tokens.dtype == torch.float32
        assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()
    assert end.frozen_parameters + sum(parameter.numel() for parameter in end.parameters()) == total
    assert len(list(tmp_path.rglob("*.npy"))) == 1 and not list(tmp_path.rglob("*.partial"))


def test_the_real_encoder_cut_is_the_real_encoder(cache: Path) -> None:
    images = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    frozen, end = build_model({"name": "dinov2_small"}, cache=cache, image_size=56, classes=10)
    with torch.inference_mode():
        tokens = frozen.forward_features(images)
        whole = dinov2_small(cache, 56)  # timm pools the class token; there is no head in it
        assert tokens.shape == (2, 17, 384)
        assert torch.allclose(end(tokens)["logits"], end.head(whole(images)), atol=1e-5)
    total = sum(parameter.numel() for parameter in whole.parameters())
    assert end.frozen_parameters + sum(p.numel() for p in end.parameters()) == total + 384 * 10 + 10


def test_adapters_find_the_last_blocks_by_their_own_numbers() -> None:
    """Counts by hand: 2 blocks of width 48; a LoRA of rank 4 on q, k, v has 4 * (48 + 48) each."""
    lora = inject(split_vit(small_vit(), 2, 2)[1], LoRA(rank=4, targets=("q", "k", "v")), train=("head",))
    trained = {name for name, parameter in lora.named_parameters() if parameter.requires_grad}
    assert {name.rpartition(".branches")[0] for name in trained if "branches" in name} == {
        "blocks.2.attn.qkv", "blocks.3.attn.qkv"
    }  # fmt: skip
    assert trainable_parameters(lora) == 2 * 3 * 4 * (48 + 48) + 48 * 2 + 2
    linear = inject(split_vit(small_vit(), 2, 2)[1], Linear(), train=("head",))
    assert trainable_parameters(linear) == 48 * 2 + 2
    full = inject(split_vit(small_vit(), 2, 2)[1], Full(), train=("head",))
    assert {name.split(".")[1] for name, _ in full.named_parameters() if name.startswith("blocks")} == {"2", "3"}
    assert trainable_parameters(full) == sum(parameter.numel() for parameter in full.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "dinov3"}, "unknown model 'dinov3'; choose from dinov2_small"),
        ({"name": "dinov2_small", "frozen_blocks": 12}, "frozen_blocks is 12; expected 0 .* to 11"),
        ({"name": "dinov2_small", "depth": 3}, "does not take these settings"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict, message: str, cache: Path) -> None:
    with pytest.raises(ValueError, match=message):
        build_model(settings, cache=cache, image_size=28, classes=2)


def give_values(model: torch.nn.Module) -> list[str]:
    """Only what lies in blocks and the final norm trains; it gets values that depend on its name alone."""
    trained = []
    for path, parameter in model.named_parameters():
        name = path.partition("blocks.")[2] or path
        parameter.requires_grad_(parameter.requires_grad and ("blocks." in path or path.startswith("norm.")))
        if "ssf_" in path and not parameter.requires_grad:
            parameter.data.fill_(float("scale" in path))  # SSF on the patch embedding, which the cut model has not
        if parameter.requires_grad:
            seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
            values = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
            parameter.data.copy_(0.2 * values + ("scale" in name))
            trained.append(name)
    return sorted(trained)


@pytest.mark.parametrize("name", sorted(set(ADAPTERS) - {"prefix", "linear"}))
def test_an_adapter_on_the_cut_model_is_that_on_the_whole(name: str) -> None:
    """Oracle: the same adapter in timm's uncut model."""
    images = Pictures().images(np.arange(9))
    low_rank = {"targets": ("q", "k", "v")}
    settings = {"lora": low_rank, "moslora": low_rank, "adalora": low_rank, "partial": {"blocks": 1}}.get(name, {})
    whole = small_vit()
    frozen, cut = split_vit(copy.deepcopy(whole), 0, classes=2)
    cut.head.load_state_dict(whole.head.state_dict())
    for model in (whole, cut):
        inject(model, ADAPTERS[name](**settings))
    assert give_values(whole) == give_values(cut) != []
    expected = whole(images)
    logits = cut(frozen.forward_features(images))["logits"]
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()
    logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in cut.parameters() if parameter.requires_grad)


def test_what_reads_sentences_does_not_go_on_images() -> None:
    with pytest.raises(ValueError, match="prefix works on towers of kind bert"):
        inject(split_vit(small_vit(), 0, classes=2)[1], ADAPTERS["prefix"]())

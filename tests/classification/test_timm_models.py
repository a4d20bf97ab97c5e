"""Whole backbones from files on the disk give timm's own features, and the head on them; wrong files are told."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from adapters import ADAPTERS, DTL, LoRA, inject, trainable_parameters
from classification.models import build_model
from classification.timm_models import ImageClassifier, load_weights

VIT = "vit_tiny_patch16_224"
SMALL = {"vit_b16": VIT, "swin_b": "swin_tiny_patch4_window7_224", "convnext_b": "convnext_tiny"}


def build(name: str, weights: Path | str, **settings: object) -> ImageClassifier:
    given = {"name": name, "architecture": SMALL[name], "weights": str(weights), **settings}
    frozen, model = build_model(given, cache=Path("nowhere"), image_size=224, classes=3)
    assert frozen is None and isinstance(model, ImageClassifier) and not model.training
    return model


def stock(architecture: str, classes: int = 0) -> nn.Module:
    torch.manual_seed(1)
    model = timm.create_model(architecture, num_classes=classes).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    return model


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", SMALL)
def test_logits_are_the_new_head_on_the_features_of_the_file(name: str, images: Tensor, tmp_path: Path) -> None:
    """The file has a head of another number of classes, as pretrained ones have, and what trains alone is ours."""
    pretrained = stock(SMALL[name], classes=7)
    if name == "swin_b":  # of the authors' layout
        torch.save({"model": pretrained.state_dict()}, path := tmp_path / "weights.pth")
    else:
        save_file(pretrained.state_dict(), path := tmp_path / "weights.safetensors")
    model = build(name, path, drop_path=0.1)
    pretrained.reset_classifier(0)
    head = model.get_submodule(model.heads[0])
    with torch.inference_mode():
        out = model(images, labels=torch.tensor([0, 2]))
        torch.testing.assert_close(out["logits"], head(pretrained(images)))
    assert out["labels"].tolist() == [0, 2] and not head.bias.any() and head.weight.std() < 0.03
    targets = ("fc1", "fc2") if name == "convnext_b" else ("q", "k", "v")
    inject(model, LoRA(rank=2, targets=targets), train=model.heads)
    assert trainable_parameters(model) > head.weight.numel() + 3


def npz_of(vit: nn.Module) -> dict[str, np.ndarray]:
    """A ViT's weights under the names and in the layout of the original release (JAX: inputs first, heads apart)."""
    width, heads = vit.embed_dim, vit.blocks[0].attn.num_heads
    of = {name: tensor.detach().numpy() for name, tensor in vit.named_parameters()}
    out = {
        "embedding/kernel": of["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": of["patch_embed.proj.bias"],
        "cls": of["cls_token"],
        "Transformer/posembed_input/pos_embedding": of["pos_embed"],
        "Transformer/encoder_norm/scale": of["norm.weight"],
        "Transformer/encoder_norm/bias": of["norm.bias"],
        "pre_logits/kernel": np.zeros((width, width), np.float32),
        "head/kernel": np.zeros((width, 21843), np.float32),
        "head/bias": np.zeros(21843, np.float32),
    }
    for index in range(len(vit.blocks)):
        ours, block = f"blocks.{index}.", f"Transformer/encoderblock_{index}/"
        attention = block + "MultiHeadDotProductAttention_1/"
        for row, part in enumerate(("query", "key", "value")):
            rows = slice(row * width, (row + 1) * width)
            out[f"{attention}{part}/kernel"] = of[ours + "attn.qkv.weight"][rows].T.reshape(width, heads, -1)
            out[f"{attention}{part}/bias"] = of[ours + "attn.qkv.bias"][rows].reshape(heads, -1)
        out[attention + "out/kernel"] = of[ours + "attn.proj.weight"].T.reshape(heads, -1, width)
        out[attention + "out/bias"] = of[ours + "attn.proj.bias"]
        for number, layer in enumerate(("fc1", "fc2")):
            out[f"{block}MlpBlock_3/Dense_{number}/kernel"] = of[f"{ours}mlp.{layer}.weight"].T
            out[f"{block}MlpBlock_3/Dense_{number}/bias"] = of[f"{ours}mlp.{layer}.bias"]
        for norm, theirs in (("norm1", "LayerNorm_0"), ("norm2", "LayerNorm_2")):
            out[f"{block}{theirs}/scale"] = of[f"{ours}{norm}.weight"]
            out[f"{block}{theirs}/bias"] = of[f"{ours}{norm}.bias"]
    return out


def test_the_original_release_of_a_vit(images: Tensor, tmp_path: Path) -> None:
    pretrained = stock(VIT)
    np.savez(tmp_path / "ViT.npz", **npz_of(pretrained))
    model = build("vit_b16", tmp_path / "ViT.npz")
    with torch.inference_mode():
        torch.testing.assert_close(model(images)["logits"], model.backbone.head(pretrained(images)))
    with pytest.raises(ValueError, match="convnext_tiny needs a state dict"):
        build("convnext_b", tmp_path / "ViT.npz")
    np.savez(tmp_path / "less.npz", **{name: value for name, value in npz_of(pretrained).items() if name != "cls"})
    with pytest.raises(ValueError, match=r"less\.npz does not hold the weights of vit_tiny_patch16_224"):
        build("vit_b16", tmp_path / "less.npz")


def test_the_mean_of_the_patches(images: Tensor, tmp_path: Path) -> None:
    """DTL's readout: the final norm of the mean over patches, without the class token."""
    pretrained = stock(VIT)
    save_file(pretrained.state_dict(), tmp_path / "weights.safetensors")
    model = build("vit_b16", tmp_path / "weights.safetensors", pool="patches")
    norm, pretrained.norm = pretrained.norm, nn.Identity()
    with torch.inference_mode():
        tokens = pretrained.forward_features(images)
        expected = model.backbone.head(norm(tokens[:, 1:].mean(dim=1)))
        torch.testing.assert_close(model(images)["logits"], expected)
        inject(model, DTL(rank=2), train=model.heads)
        torch.testing.assert_close(model(images)["logits"], expected)
    with pytest.raises(ValueError, match="convnext_tiny pools already"):
        build("convnext_b", "random", pool="patches")


def test_wrong_files_are_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no weights at .*absent\.npz; nothing is downloaded"):
        build("vit_b16", tmp_path / "absent.npz")
    with pytest.raises(ValueError, match=r"model\.architecture is 'vit_b'"):
        build("vit_b16", "random", architecture="vit_b")
    state = stock(VIT).state_dict()
    save_file({name: t for name, t in state.items() if name != "norm.bias"}, tmp_path / "less.safetensors")
    save_file(state | {"blocks.12.norm1.bias": torch.zeros(192)}, tmp_path / "more.safetensors")
    save_file(state | {"cls_token": torch.zeros(1, 1, 384)}, tmp_path / "wider.safetensors")
    for name, told in (("less", "missing norm.bias"), ("more", "not known there blocks.12"), ("wider", "cls_token")):
        with pytest.raises(ValueError, match=rf"{name}\.safetensors does not hold the weights of {VIT}: .*{told}"):
            build("vit_b16", tmp_path / f"{name}.safetensors")


def test_damaged_and_refused_files_are_told(tmp_path: Path) -> None:
    model = timm.create_model(VIT, num_classes=0)
    state = model.state_dict()
    save_file(state, tmp_path / "a.safetensors")
    torch.save(state, tmp_path / "a.pth")
    np.savez(tmp_path / "a.npz", **{name: array for name, array in npz_of(model).items() if "head" not in name})
    for name in ("a.safetensors", "a.pth", "a.npz"):
        content = (tmp_path / name).read_bytes()
        for size in (0, 100, len(content) // 2, len(content) - 10):
            (tmp_path / f"cut_{name}").write_bytes(content[:size])
            with pytest.raises(ValueError, match=rf"cut_{name} cannot be read as weights .*damaged, get it again"):
                load_weights(model, tmp_path / f"cut_{name}")
    changed = bytearray((tmp_path / "a.npz").read_bytes())
    changed[len(changed) // 2] ^= 1
    (tmp_path / "changed.npz").write_bytes(changed)
    with pytest.raises(ValueError, match=r"changed\.npz cannot be read as weights .*CRC"):
        load_weights(model, tmp_path / "changed.npz")
    torch.save({"model": {"cls_token": torch.zeros(1)}, "folder": tmp_path}, tmp_path / "pickle.pth")
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    for name in ("pickle", "tensor"):
        with pytest.raises(ValueError, match=rf"{name}\.pth cannot be read as weights .*holds more than tensors is"):
            load_weights(model, tmp_path / f"{name}.pth")
    swin = timm.create_model(SMALL["swin_b"], num_classes=0)
    table = "layers.9.blocks.0.attn.relative_position_bias_table"
    save_file({table: torch.zeros(169, 3)}, tmp_path / "deeper.safetensors")
    with pytest.raises(ValueError, match=r"deeper\.safetensors does not hold the weights of swin_tiny"):
        load_weights(swin, tmp_path / "deeper.safetensors")


@pytest.mark.parametrize(
    ("name", "adapter", "settings", "count"),
    [
        ("vit_b16", "lora", {"rank": 8, "targets": ("q", "k", "v")}, 442_368),
        ("vit_b16", "ssf", {}, 205_824),
        ("vit_b16", "bitfit", {}, 102_912),
        ("swin_b", "lora", {"rank": 8, "targets": ("q", "k", "v")}, 577_536),
        ("convnext_b", "lora", {"rank": 8, "targets": ("fc1", "fc2")}, 1_443_840),
    ],
)
def test_published_counts_on_the_whole_models(name: str, adapter: str, settings: dict, count: int) -> None:
    """0.44, 0.21 and 0.10 M parameters of Table 2; Swin's and ConvNeXt's by hand (48 and 80 x sum of widths)."""
    architectures = {
        "vit_b16": "vit_base_patch16_224", "swin_b": "swin_base_patch4_window7_224", "convnext_b": "convnext_base"
    }  # fmt: skip
    with torch.device("meta"):
        model = build(name, "random", architecture=architectures[name])
        inject(model, ADAPTERS[adapter](**settings), train=model.heads)
    head = sum(parameter.numel() for parameter in model.get_submodule(model.heads[0]).parameters())
    assert trainable_parameters(model) - head == count

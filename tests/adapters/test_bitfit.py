"""BitFit against published counts and the rule that named_parameters alone can state."""

from __future__ import annotations

import pytest
import timm
import torch
from backbones import BACKBONES, build
from test_ssf import clip_b32
from torch import nn
from transformers import BertConfig, BertModel

from adapters import BitFit, adapter_parameter_names, inject, trainable_parameters


@pytest.mark.parametrize(
    ("name", "settings", "count"),
    [
        ("vit_base_patch16_224", {}, 102_912),
        ("swin_base_patch4_window7_224", {}, 200_760),
        ("swin_base_patch4_window7_224", {"position_tables": False}, 137_216),
        ("convnext_base", {}, 130_304),
        ("bert", {}, 102_912),
        ("clip", {}, 171_008),
        ("clip", {"norms": False}, 138_240),
    ],
)
def test_published_counts(name: str, settings: dict, count: int) -> None:
    """0.10 and 0.20 M of the ReSoRA paper's Table 2; with the 787,456 of the projection 0.9 M (BERT), and 0.1 M (CLIP
    without norms) of Table 1. timm's heads are there, and not counted."""
    with torch.device("meta"):
        if name == "bert":
            model: nn.Module = BertModel(BertConfig())
        else:
            model = clip_b32() if name == "clip" else timm.create_model(name, num_classes=7)
    assert trainable_parameters(inject(model, BitFit(**settings))) == count


@pytest.mark.parametrize("backbone", BACKBONES)
def test_all_of_the_towers_and_nothing_of_the_head(backbone: str) -> None:
    model = inject(build(backbone), BitFit())
    names = {name for name, _ in model.named_parameters()}
    expected = {name for name in names if "bias" in name.rpartition(".")[2] and not name.startswith("head.")}
    assert (
        adapter_parameter_names(model) == {name for name, p in model.named_parameters() if p.requires_grad} == expected
    )


def test_timms_own_head_trains_if_it_is_named() -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=5)
    inject(model, BitFit(), train=("head",))
    assert model.head.bias.requires_grad and model.head.weight.requires_grad
    assert not any(name.startswith("head") for name in adapter_parameter_names(model))
    distilled = inject(timm.create_model("deit_tiny_distilled_patch16_224", depth=1, num_classes=5), BitFit())
    assert not any(name.startswith("head") for name in adapter_parameter_names(distilled))


def test_a_temperature_is_no_bias() -> None:
    from open_clip.model import CLIP

    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 8, "patch_size": 8}
    text = {"context_length": 12, "vocab_size": 50, "width": 24, "heads": 4, "layers": 1}
    model = inject(CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text, init_logit_bias=-10.0), BitFit())
    assert not model.logit_bias.requires_grad and model.ln_final.bias.requires_grad


def test_what_has_no_biases_is_refused() -> None:
    with pytest.raises(ValueError, match="bitfit works on towers of kind bert"):
        inject(nn.Sequential(nn.Linear(3, 3)), BitFit())
    model = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=0)
    for module in model.modules():
        if getattr(module, "bias", None) is not None:
            module.bias = None
    with pytest.raises(ValueError, match="bitfit trains biases, but"):
        inject(model, BitFit())

"""Full and partial fine-tuning: published counts, and which parts train."""

from __future__ import annotations

import pytest
import timm
import torch
from backbones import BACKBONES, build
from test_ssf import clip_b32
from torch import nn
from transformers import BertConfig, BertModel

from adapters import Full, Linear, Partial, adapter_parameter_names, inject, trainable_parameters


def meta(name: str) -> nn.Module:
    with torch.device("meta"):
        if name == "bert":
            return BertModel(BertConfig())
        return clip_b32() if name == "clip" else timm.create_model(name, num_classes=0)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("vit_base_patch16_224", 85_798_656),
        ("swin_base_patch4_window7_224", 86_743_224),
        ("convnext_base", 87_566_464),
        ("bert", 109_482_240),
        ("clip", 151_277_313),
    ],
)
def test_published_counts(name: str, count: int) -> None:
    """85.8, 86.7, 109.5 and 151.3 M of the ReSoRA paper's Tables 1 and 2."""
    assert trainable_parameters(inject(meta(name), Full())) == count
    assert trainable_parameters(inject(meta(name), Linear())) == 0


def test_published_counts_of_partial() -> None:
    """0.7 M of Table 1 on CLIP: 768 * 512 + 512 * 512. A block of ViT-B has 7,087,872, its last norm 1,536."""
    assert trainable_parameters(inject(meta("clip"), Partial())) == 655_360
    assert trainable_parameters(inject(meta("vit_base_patch16_224"), Partial())) == 0
    assert trainable_parameters(inject(meta("vit_base_patch16_224"), Partial(blocks=2))) == 2 * 7_087_872 + 1_536


LAST = {
    "bert": {"encoder.layer.2"},
    "vit": {"blocks.2", "norm"},
    "swin": {"layers.1.blocks.1", "norm"},
    "convnext": {"stages.3.blocks.0", "head.norm"},
    "clip": {"visual.transformer.resblocks.2", "visual.ln_post", "visual.proj",
             "transformer.resblocks.2", "ln_final", "text_projection"},
}  # fmt: skip
LAST["clip, own attention"] = LAST["clip"]


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_last_block_and_the_norm_after_it(backbone: str) -> None:
    model = build(backbone)
    expected = {
        name
        for name, _ in model.named_parameters()
        if any(name == f"backbone.{part}" or name.startswith(f"backbone.{part}.") for part in LAST[backbone])
    }
    assert adapter_parameter_names(inject(model, Partial(blocks=1))) == expected


def test_bad_numbers_of_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="partial needs blocks >= 0, but got -1"):
        Partial(blocks=-1)
    with pytest.raises(ValueError, match="partial with blocks=4: backbone has 3"):
        inject(build("vit"), Partial(blocks=4))

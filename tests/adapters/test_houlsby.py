"""Houlsby adapters against the formula, written with the pieces of the stock blocks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from backbones import build, inputs
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from adapters import Houlsby, inject, trainable_parameters
from regularizers import capture


def filled(model: nn.Module, **settings: Any) -> nn.Module:
    """Adapted, with values as if trained: biases that are not zero, weights that make a difference."""
    torch.manual_seed(1)
    inject(model, Houlsby(bottleneck=5, **settings))
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return model


def expected(model: nn.Module, path: str, h: Tensor) -> Tensor:
    """h + up(SiLU(down h)), channels last."""
    parts = model.get_submodule(f"{path}.branches.bottleneck").state_dict()
    z = h @ parts["down.weight"].T + parts["down.bias"]
    return h + (z * torch.sigmoid(z)) @ parts["up.weight"].T + parts["up.bias"]


def test_vit_with_layer_scale_after_the_adapter() -> None:
    stock = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, embed_dim=32, num_heads=4, depth=2, init_values=0.5
    ).eval()
    model, x = filled(copy.deepcopy(stock)), torch.randn(2, 7, 32)
    block, here = stock.blocks[1], "blocks.1"
    x1 = x + 0.5 * expected(model, f"{here}.attn", block.attn(block.norm1(x)))
    out = x1 + 0.5 * expected(model, f"{here}.mlp", block.mlp(block.norm2(x1)))
    torch.testing.assert_close(model.blocks[1](x), out)
    with capture(model) as tokens:
        model.blocks[1](x)
    with capture(model, samples="mean") as items:
        model.blocks[1](x)
    assert len(tokens) == len(items) == 2
    for name, (activations, _) in items.items():
        torch.testing.assert_close(activations, tokens[name].activations.view(2, 7, 5).mean(1))


def test_swin_without_the_padding_of_its_windows() -> None:
    """12 x 12 patches in windows of 8: the padded map has 16 x 16, of which 144 are samples."""
    stock = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=48, embed_dim=16, depths=(2, 2), num_heads=(2, 4), window_size=8
    ).eval()
    model = filled(copy.deepcopy(stock))
    block, here, x = stock.layers[0].blocks[1], "layers.0.blocks.1", torch.randn(3, 12, 12, 16)
    x1 = x + expected(model, f"{here}.drop_path1", block._attn(block.norm1(x)))
    out = x1 + expected(model, f"{here}.mlp", block.mlp(block.norm2(x1)))
    with capture(model, samples="tokens") as tokens:
        torch.testing.assert_close(model.layers[0].blocks[1](x), out)
    assert [len(s.activations) for s in tokens.values()] == [3 * 144] * 2
    with capture(model, samples="mean") as items:
        model.layers[0].blocks[1](x)
    assert items.keys() == tokens.keys()
    for name, (activations, basis) in items.items():  # of an image (12, 12) the mean over all its patches
        torch.testing.assert_close(activations, tokens[name].activations.view(3, 144, 5).mean(1))
        assert torch.equal(basis, tokens[name].basis)


@pytest.mark.parametrize("conv_mlp", [False, True])
def test_convnext_within_gamma(conv_mlp: bool) -> None:
    stock = timm.create_model(
        "convnext_tiny", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), conv_mlp=conv_mlp, ls_init_value=0.5
    ).eval()
    model = filled(copy.deepcopy(stock))
    block, x = stock.stages[1].blocks[0], torch.randn(2, 16, 6, 5)
    if conv_mlp:
        h = block.mlp(block.norm(block.conv_dw(x))).permute(0, 2, 3, 1)
    else:
        h = block.mlp(block.norm(block.conv_dw(x).permute(0, 2, 3, 1)))
    out = x + 0.5 * expected(model, "stages.1.blocks.0.mlp", h).permute(0, 3, 1, 2)
    with capture(model) as subspaces:
        torch.testing.assert_close(model.stages[1].blocks[0](x), out)
    (found,) = subspaces.values()
    assert found.activations.shape == (2 * 6 * 5, 5) and found.basis.shape == (5, 16)


@pytest.mark.parametrize("backbone", ["clip", "clip, own attention"])
def test_clip_in_both_towers(backbone: str) -> None:
    stock = build(backbone).backbone
    model = filled(copy.deepcopy(stock))
    mask = torch.full((6, 6), float("-inf")).triu(1)
    for tower, width in (("visual.transformer", 32), ("transformer", 24)):
        here = f"{tower}.resblocks.2"
        block, x = stock.get_submodule(here), torch.randn(3, 6, width)
        normed = block.ln_1(x)
        if backbone == "clip":
            attended, _ = block.attn(normed, normed, normed, need_weights=False, attn_mask=mask)
        else:
            attended = block.attn(normed, attn_mask=mask)
        x1 = x + expected(model, f"{here}.attn", attended)
        out = x1 + expected(model, f"{here}.mlp.c_proj", block.mlp(block.ln_2(x1)))
        for training in (False, True):  # nn.MultiheadAttention has another path in evaluation
            actual = model.get_submodule(here).train(training)(x, attn_mask=mask)
            torch.testing.assert_close(actual, out, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_bert_between_dropout_and_norm(training: bool) -> None:
    """In training with a dropout of 1 the adapter sees zeros, and its biases go into the norm."""
    stock = build("bert").backbone
    for module in stock.modules():
        if isinstance(module, nn.Dropout):
            module.p = 1.0
    model = filled(copy.deepcopy(stock))
    layer, here, x = stock.encoder.layer[1], "encoder.layer.1", torch.randn(2, 6, 32)
    kept = 0.0 if training else 1.0
    attended = kept * layer.attention.output.dense(layer.attention.self(x)[0])
    x1 = layer.attention.output.LayerNorm(x + expected(model, f"{here}.attention.output.dropout", attended))
    ffn = kept * layer.output.dense(layer.intermediate(x1))
    out = layer.output.LayerNorm(x1 + expected(model, f"{here}.output.dropout", ffn))
    torch.testing.assert_close(model.encoder.layer[1].train(training)(x), out)


def test_mlp_only_and_sizes_by_layer() -> None:
    model = inject(build("vit"), Houlsby(bottleneck=5, sublayers=("mlp",), bottleneck_pattern={r"blocks\.0\.": 2}))
    sizes = {name: len(p) for name, p in model.named_parameters() if name.endswith("down.bias")}
    assert sizes == {f"backbone.blocks.{i}.mlp.branches.bottleneck.down.bias": 5 if i else 2 for i in range(3)}


def test_subspaces_are_the_output_without_its_bias_and_without_padding() -> None:
    stock = build("bert").backbone
    model, (ids, mask) = filled(copy.deepcopy(stock)), inputs("bert")
    seen: dict[str, Tensor] = {}
    layer = model.encoder.layer[0].output.dropout
    layer.branches.bottleneck.register_forward_hook(lambda module, args, out: seen.update(out=out))
    with capture(model) as subspaces:
        model(input_ids=ids, attention_mask=mask)
    activations, basis = subspaces["encoder.layer.0.output.dropout.bottleneck"]
    bias = layer.branches.bottleneck.up.bias
    torch.testing.assert_close(activations @ basis, (seen["out"] - bias)[mask.bool()], atol=1e-5, rtol=1e-5)

    with capture(model, on="weights") as weights:
        pass
    activations, basis = weights["encoder.layer.0.output.dropout.bottleneck"]
    parts = layer.branches.bottleneck.state_dict()
    assert torch.equal(activations @ basis, parts["down.weight"].T @ parts["up.weight"].T)


def test_a_penalty_has_the_same_gradient_under_reentrant_checkpointing() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = filled(build("bert").backbone).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": True})
            model.enable_input_require_grads()
        ids, mask = inputs("bert")
        with capture(model) as subspaces:
            out = model(input_ids=ids, attention_mask=mask).last_hidden_state
        (out.square().sum() + sum(s.activations.pow(4).sum() for s in subspaces.values())).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert len(gradients[0]) == 3 * 2 * 4
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-4, rtol=1e-4)


def test_initial_values() -> None:
    model = inject(build("vit"), Houlsby(bottleneck=64))
    parts = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all(not p.any() for n, p in parts.items() if n.endswith("bias"))
    for end in ("down.weight", "up.weight"):
        values = torch.cat([p.flatten() for n, p in parts.items() if n.endswith(end)])
        assert values.mean().abs() < 1e-3 and values.std().item() == pytest.approx(0.02, rel=0.05)
        assert values.abs().max() > 0.05  # a normal distribution, not a uniform one


def test_published_count_on_bert_base() -> None:
    """With the 787,456 of VSE-infinity's projection, 2,576,512: the 2.6 M of Table 1."""
    with torch.device("meta"):
        model = BertModel(BertConfig())
    assert trainable_parameters(inject(model, Houlsby())) == 1_789_056 == 2_576_512 - 787_456


def test_counts_on_clip_and_vit() -> None:
    from open_clip.model import CLIP

    with torch.device("meta"):
        vision = {"image_size": 224, "layers": 12, "width": 768, "patch_size": 32}
        text = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12}
        clip = CLIP(embed_dim=512, vision_cfg=vision, text_cfg=text)
        vit = [timm.create_model("vit_base_patch16_224", num_classes=0) for _ in range(2)]
    inject(clip, Houlsby(bottleneck=64, bottleneck_pattern={"visual": 96}))  # an eighth of each width
    assert trainable_parameters(clip) == 5_146_368
    assert trainable_parameters(inject(vit[0], Houlsby(bottleneck=8))) == 313_536
    assert trainable_parameters(inject(vit[1], Houlsby(bottleneck=8, sublayers=("mlp",)))) == 156_768


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bottleneck": 0}, "houlsby needs bottleneck >= 1, but got 0"),
        ({"bottleneck_pattern": {"visual": 0}}, "but got 48, 0"),
        ({"bottleneck_pattern": {"q(": 1}}, "no regular expression"),
        ({"sublayers": ("attn",)}, r"out of attention, mlp, each once, but got \('attn',\)"),
        ({"sublayers": ()}, r"but got \(\)"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Houlsby(**settings)


def test_bad_injections_are_refused() -> None:
    with pytest.raises(ValueError, match=r"houlsby with sublayers=\('attention',\): .* convnext have mlp only"):
        inject(build("convnext"), Houlsby(sublayers=("attention",)))
    with pytest.raises(ValueError, match=r"'visual' is found in no layer .* houlsby adapts, such as backbone.blocks.0"):
        inject(build("vit"), Houlsby(bottleneck_pattern={"visual": 3}))
    with pytest.raises(ValueError, match="houlsby works on towers of kind bert"):
        inject(nn.Linear(3, 3), Houlsby())
    other = build("vit")
    other.backbone.blocks[1].attention = other.backbone.blocks[1].__dict__["_modules"].pop("attn")
    with pytest.raises(ValueError, match=r"houlsby goes into a block's attn, but backbone.blocks.1 \(Block\) has"):
        inject(other, Houlsby())

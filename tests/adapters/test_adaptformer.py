"""AdaptFormer against the formula, written with the pieces of the stock blocks."""

from __future__ import annotations

import copy
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import timm
import torch
from backbones import build
from timm.models.vision_transformer import ResPostBlock
from torch import Tensor, nn

from adapters import AdaptFormer, inject, trainable_parameters
from regularizers import capture

S = 0.3


def filled(model: nn.Module, **settings: Any) -> nn.Module:
    """Adapted, with values as if trained."""
    torch.manual_seed(1)
    inject(model, AdaptFormer(bottleneck=5, scale=S, **settings))
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.5)
    return model


def added(model: nn.Module, path: str, x: Tensor) -> Tensor:
    """s * up(ReLU(down x)), channels last."""
    parts = model.get_submodule(f"{path}.branches.bottleneck").state_dict()
    hidden = (x @ parts["down.weight"].T + parts["down.bias"]).clamp(min=0)
    return S * (hidden @ parts["up.weight"].T + parts["up.bias"])


def small_vit(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, embed_dim=32, num_heads=4, depth=2, num_classes=0, **settings
    ).eval()


def test_vit_on_the_residual_stream_beside_layer_scale() -> None:
    stock = small_vit(init_values=0.5)
    model, x = filled(copy.deepcopy(stock)), torch.randn(2, 7, 32)
    block = stock.blocks[1]
    x1 = x + 0.5 * block.attn(block.norm1(x))
    out = x1 + 0.5 * block.mlp(block.norm2(x1)) + added(model, "blocks.1.drop_path2", x1)
    torch.testing.assert_close(model.blocks[1](x), out)


def test_stochastic_depth_leaves_the_adapter() -> None:
    stock = small_vit(drop_path_rate=0.5)
    model, x = filled(copy.deepcopy(stock), dropout=0.0), torch.randn(2, 7, 32)
    adapted = model.blocks[1].train()
    adapted.drop_path1.drop_prob = adapted.drop_path2.drop_prob = 1.0
    torch.testing.assert_close(adapted(x), x + added(model, "blocks.1.drop_path2", x))


def test_swin() -> None:
    stock = build("swin").backbone
    model = filled(copy.deepcopy(stock))
    block, x = stock.layers[1].blocks[1], torch.randn(3, 8, 8, 32)
    x1 = x + block._attn(block.norm1(x))
    out = x1 + block.mlp(block.norm2(x1)) + added(model, "layers.1.blocks.1.drop_path2", x1)
    with capture(model, samples="mean") as items:
        torch.testing.assert_close(model.layers[1].blocks[1](x), out)
    assert items["layers.1.blocks.1.drop_path2.bottleneck"].activations.shape == (3, 5)


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
        x1 = x + attended
        out = x1 + block.mlp(block.ln_2(x1)) + added(model, f"{here}.ls_2", x1)
        torch.testing.assert_close(model.get_submodule(here)(x, attn_mask=mask), out, atol=1e-5, rtol=1e-5)


def test_bert_before_the_last_norm() -> None:
    stock = build("bert").backbone
    model = filled(copy.deepcopy(stock))
    layer, x = stock.encoder.layer[1], torch.randn(2, 6, 32)
    x1 = layer.attention.output(layer.attention.self(x)[0], x)
    ffn = layer.output.dense(layer.intermediate(x1))
    out = layer.output.LayerNorm(x1 + ffn + added(model, "encoder.layer.1.output", x1))
    torch.testing.assert_close(model.encoder.layer[1](x), out)


@pytest.mark.parametrize("conv_mlp", [False, True])
def test_convnext_beside_the_mlp_within_gamma(conv_mlp: bool) -> None:
    stock = timm.create_model(
        "convnext_tiny", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), conv_mlp=conv_mlp, ls_init_value=0.5
    ).eval()
    model = filled(copy.deepcopy(stock))
    block, x = stock.stages[1].blocks[0], torch.randn(2, 16, 6, 5)
    if conv_mlp:
        h = block.norm(block.conv_dw(x))
        mlp, h = block.mlp(h).permute(0, 2, 3, 1), h.permute(0, 2, 3, 1)
    else:
        h = block.norm(block.conv_dw(x).permute(0, 2, 3, 1))
        mlp = block.mlp(h)
    out = x + 0.5 * (mlp + added(model, "stages.1.blocks.0.mlp", h)).permute(0, 3, 1, 2)
    torch.testing.assert_close(model.stages[1].blocks[0](x), out)


def test_subspaces_are_the_scaled_output_without_its_bias() -> None:
    model, x = filled(small_vit(), dropout=0.5).train(), torch.randn(3, 3, 32, 32)
    joint, seen = model.blocks[0].drop_path2, {}
    joint.branches.bottleneck.register_forward_hook(lambda module, args, out: seen.update(out=out))
    with capture(model) as subspaces:
        model(x)
    activations, basis = subspaces["blocks.0.drop_path2.bottleneck"]
    bias = S * joint.branches.bottleneck.up.bias
    torch.testing.assert_close(activations @ basis, (seen["out"] - bias).flatten(0, 1), atol=1e-5, rtol=1e-4)
    assert 0.65 < (activations == 0).float().mean() < 0.85  # half by the ReLU, and half of the rest by dropout

    with capture(model, on="weights") as weights:
        pass
    activations, basis = weights["blocks.0.drop_path2.bottleneck"]
    parts = joint.branches.bottleneck.state_dict()
    torch.testing.assert_close(activations @ basis, S * parts["down.weight"].T @ parts["up.weight"].T)


def test_dropout_acts_in_training_only() -> None:
    model, x = filled(small_vit()), torch.randn(2, 3, 32, 32)  # the default, 0.1
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


def test_threads_do_not_see_each_others_stream() -> None:
    model = filled(small_vit())
    batches = [torch.randn(1 + i % 4, 3, 32, 32) for i in range(40)]
    with torch.no_grad(), ThreadPoolExecutor(4) as pool:
        expected = [model(x) for x in batches]
        for actual, out in zip(pool.map(model, batches), expected, strict=True):
            torch.testing.assert_close(actual, out, atol=1e-5, rtol=1e-5)


def test_initial_values() -> None:
    model = inject(build("vit"), AdaptFormer())
    parts = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(parts) == 3 * 4
    assert all(not p.any() for n, p in parts.items() if not n.endswith("down.weight"))
    down = torch.cat([p.flatten() for n, p in parts.items() if n.endswith("down.weight")])
    assert down.abs().max() <= 1 / math.sqrt(32)
    assert down.std().item() == pytest.approx(1 / math.sqrt(3 * 32), rel=0.03)  # of a uniform distribution


@pytest.mark.parametrize(("bottleneck", "count"), [(8, 156_768), (64, 1_189_632)])
def test_published_counts_on_vit_b16(bottleneck: int, count: int) -> None:
    """0.16 M in Table 2; 1.19 M in AdaptFormer's own tables."""
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", num_classes=0)
    assert trainable_parameters(inject(model, AdaptFormer(bottleneck=bottleneck))) == count


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bottleneck": 0}, "adaptformer needs bottleneck >= 1, but got 0"),
        ({"scale": 0.0}, "scale > 0 .* got scale=0.0"),
        ({"dropout": 1.0}, "dropout < 1, but got .* dropout=1.0"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdaptFormer(**settings)


def test_blocks_of_another_form_are_refused() -> None:
    """With the norm after the MLP, or a scale of the block's own, x1 could not be handed along."""
    swin_v2 = timm.create_model(
        "swinv2_tiny_window8_256", img_size=64, embed_dim=16, depths=(2, 2), num_heads=(2, 4), window_size=4
    )
    eva = timm.create_model("eva02_tiny_patch14_224", img_size=28, embed_dim=32, num_heads=4, depth=1, init_values=0.1)
    for model in (swin_v2, eva, small_vit(block_fn=ResPostBlock)):
        before = {name: type(module) for name, module in model.named_modules()}
        with pytest.raises(ValueError, match=r"adaptformer needs blocks that add norm2 -> mlp .* has, in this order"):
            inject(model, AdaptFormer())
        assert {name: type(module) for name, module in model.named_modules()} == before


def test_a_module_called_out_of_turn_says_so() -> None:
    model = filled(small_vit())
    with pytest.raises(TypeError, match="adaptformer: this module runs after its block's second norm"):
        model.blocks[0].mlp(torch.randn(2, 7, 32))

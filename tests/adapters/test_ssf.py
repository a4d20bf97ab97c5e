"""SSF against stock models whose weights are scaled by hand, and against published counts."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from functools import partial

import pytest
import timm
import torch
from backbones import BACKBONES, build, inputs
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertModel

from adapters import SSF, inject, merge, trainable_parameters
from adapters.extend import extend
from adapters.ssf import ScaledMultiheadAttention


def spread(model: nn.Module) -> nn.Module:
    """Scales and shifts far from their start, as if trained."""
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if name.endswith("ssf_scale"):
            nn.init.uniform_(parameter, 0.5, 1.5)
        elif name.endswith("ssf_shift"):
            nn.init.normal_(parameter, std=0.3)
    return model


@torch.no_grad()
def scaled_by_hand(stock: nn.Module, adapted: nn.Module) -> nn.Module:
    """W <- diag(gamma) W, b <- gamma b + beta, in the arithmetic of float32."""
    parameters = dict(stock.named_parameters())
    values = {name: p.float() for name, p in adapted.named_parameters() if ".ssf_" in name}
    for name, gamma in values.items():
        path, _, kind = name.rpartition(".")
        if kind == "ssf_shift":
            continue
        fused = "in_proj_" if f"{path}.in_proj_weight" in parameters else ""
        weight, bias = parameters[f"{path}.{fused}weight"], parameters.get(f"{path}.{fused}bias")
        weight.copy_(torch.einsum("o,o...->o...", gamma, weight.float()))
        beta = values.get(f"{path}.ssf_shift")
        if bias is not None:
            bias.copy_(gamma * bias.float() + beta)
        elif beta is not None:
            assert path.endswith("visual.conv1")
            positions = parameters[path.replace("conv1", "positional_embedding")]
            positions[1:] = positions[1:].float() + beta
    return stock


@pytest.mark.parametrize("backbone", BACKBONES)
def test_outputs_and_merged_weights_are_those_of_scaled_weights(backbone: str) -> None:
    x = inputs(backbone)
    model = spread(inject(build(backbone), SSF()))
    by_hand = scaled_by_hand(build(backbone), model)
    torch.testing.assert_close(model(*x), by_hand(*x), atol=2e-5, rtol=1e-5)
    merge(model)
    for name, parameter in by_hand.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter, atol=1e-6, rtol=1e-6)


def clip_b32() -> nn.Module:
    from open_clip.model import CLIP

    vision = {"image_size": 224, "layers": 12, "width": 768, "patch_size": 32}
    text = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12}
    return CLIP(embed_dim=512, vision_cfg=vision, text_cfg=text)


PUBLISHED: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "ViT-B/16": (lambda: timm.create_model("vit_base_patch16_224", num_classes=7), 205_824),
    "Swin-B": (lambda: timm.create_model("swin_base_patch4_window7_224", num_classes=7), 274_432),
    "BERT-base": (lambda: BertModel(BertConfig()), 204_288),
    "CLIP ViT-B/32": (clip_b32, 343_552),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_counts(name: str) -> None:
    """0.21 M of the ReSoRA paper's Table 2 on ViT-B, 0.2 M of its Table 1 on BERT; the others by the same rule."""
    create, count = PUBLISHED[name]
    with torch.device("meta"):
        model = create()
    assert trainable_parameters(inject(model, SSF())) == count


def test_count_on_convnext_b() -> None:
    """Per block conv_dw, norm, fc1 and fc2: 7 d channels; stem and head norms; each downsampling's norm and conv."""
    dims, depths = (128, 256, 512, 1024), (3, 3, 27, 3)
    channels = sum(7 * d * n for d, n in zip(dims, depths, strict=True)) + 2 * dims[0] + dims[-1]
    channels += sum(a + b for a, b in itertools.pairwise(dims))
    with torch.device("meta"):
        model = timm.create_model("convnext_base", num_classes=7)
    assert trainable_parameters(inject(model, SSF())) == 2 * channels


def test_initial_values() -> None:
    model = inject(build("bert"), SSF())
    gamma = torch.cat([p for n, p in model.named_parameters() if n.endswith("ssf_scale")])
    beta = torch.cat([p for n, p in model.named_parameters() if n.endswith("ssf_shift")])
    assert len(gamma) == len(beta) > 1000
    assert gamma.mean().item() == pytest.approx(1, abs=0.003)
    assert beta.mean().item() == pytest.approx(0, abs=0.003)
    assert gamma.std().item() == pytest.approx(0.02, rel=0.1)
    assert beta.std().item() == pytest.approx(0.02, rel=0.1)


def no_bias_vit() -> nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, embed_dim=32, num_heads=4, depth=2, patch_size=8, num_classes=5,
        qkv_bias=False, norm_layer=partial(nn.LayerNorm, bias=False),
    )  # fmt: skip


def channels_first_convnext() -> nn.Module:
    return timm.create_model(
        "convnext_tiny", depths=(1, 1, 2, 1), dims=(8, 16, 24, 32), conv_mlp=True, head_norm_first=True, num_classes=5
    )


def prenorm_vit() -> nn.Module:
    return timm.create_model(
        "vit_base_patch16_clip_224", img_size=32, embed_dim=32, num_heads=4, depth=2, patch_size=8, num_classes=5
    )


@pytest.mark.parametrize("create", [no_bias_vit, channels_first_convnext, prenorm_vit])
def test_variants_merge(create: Callable[[], nn.Module]) -> None:
    """Layers without a bias are scaled only; ConvNeXt's other order of axes; a norm before the blocks."""
    torch.manual_seed(0)
    model, x = create().eval(), torch.randn(3, 3, 32, 32)
    shifted = {name for name, _ in model.named_parameters() if name.endswith("bias")} - {"head.bias", "head.fc.bias"}
    spread(inject(model, SSF()))
    shifts = {name for name, _ in model.named_parameters() if name.endswith("ssf_shift")}
    assert shifts == {name.removesuffix("bias") + "ssf_shift" for name in shifted}
    expected = model(x)
    torch.testing.assert_close(merge(model)(x), expected, atol=2e-5, rtol=1e-5)


def test_a_bfloat16_model_merges_in_float32() -> None:
    model, stock = spread(inject(build("clip").bfloat16(), SSF())), build("clip").bfloat16()
    by_hand = scaled_by_hand(stock, model)
    merge(model)
    for name, parameter in by_hand.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name


@pytest.mark.parametrize("backbone", BACKBONES)
def test_autocast_keeps_the_types_of_the_stock_model(backbone: str) -> None:
    def types(model: nn.Module) -> dict[str, torch.dtype]:
        found: dict[str, torch.dtype] = {}

        def note(name: str) -> Callable[..., None]:
            def hook(_: nn.Module, __: object, output: object) -> None:
                if isinstance(output, Tensor):
                    found[name] = output.dtype

            return hook

        for name, module in model.named_modules():
            module.register_forward_hook(note(name))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(*inputs(backbone))
        return found

    stock, adapted = types(build(backbone)), types(inject(build(backbone), SSF()))
    assert torch.bfloat16 in stock.values()
    assert stock == {name: adapted[name] for name in stock}


def test_small_scales_survive_autocast() -> None:
    """A scale of 1.003 is 1 in bfloat16; on an output of 1000 it makes 3."""
    model = inject(build("vit"), SSF())
    layer = model.backbone.blocks[0].mlp.fc1
    layer.weight.data.fill_(0), layer.bias.data.fill_(1000)
    layer.ssf_scale.data.fill_(1.003), layer.ssf_shift.data.fill_(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(torch.zeros(1, 32))
    assert out.dtype == torch.bfloat16
    assert (out == torch.tensor(1003.0).bfloat16()).all() and out[0, 0] > 1000


def test_checkpointed_blocks_of_open_clips_own_attention_give_the_same_gradients() -> None:
    """By hand: in open_clip 3.3.0 `set_grad_checkpointing` fails on these blocks, also without an adapter."""
    gradients = []
    torch.manual_seed(0)
    model = spread(inject(build("clip, own attention"), SSF())).train()
    blocks, tokens = model.backbone.visual.transformer.resblocks, torch.randn(2, 17, 32)
    for again in (False, True):
        model.zero_grad()
        x = tokens
        for block in blocks:
            x = checkpoint(block, x, use_reentrant=False) if again else block(x)
        x.square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in blocks.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and any("attn.ssf_scale" in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_other_models_are_refused() -> None:
    with pytest.raises(ValueError, match="ssf works on towers of kind bert"):
        inject(nn.Sequential(nn.Linear(3, 3)), SSF())
    beit = timm.create_model("beit_base_patch16_224", img_size=32, depth=1, embed_dim=32, num_heads=4, num_classes=0)
    with pytest.raises(ValueError, match="ssf scales what layers put out"):
        inject(beit, SSF())


def test_a_refused_tower_leaves_the_others_as_they_were() -> None:
    beit = timm.create_model("beit_base_patch16_224", img_size=32, depth=1, embed_dim=32, num_heads=4, num_classes=0)
    for towers in ({"a": beit, "b": build("vit")}, {"a": build("vit"), "b": beit}):
        model = nn.ModuleDict(towers)
        before = {name: type(module) for name, module in model.named_modules()}
        with pytest.raises(ValueError, match="ssf scales what layers put out"):
            inject(model, SSF())
        assert {name: type(module) for name, module in model.named_modules()} == before
        assert not any("ssf" in name for name, _ in model.named_parameters())
        assert all(parameter.requires_grad for parameter in model.parameters())


def test_cross_attention_is_scaled_by_its_own_channels() -> None:
    stock = nn.MultiheadAttention(16, 2, batch_first=True).eval()
    adapted = extend(copy.deepcopy(stock), ScaledMultiheadAttention)
    adapted.ssf_scale, adapted.ssf_shift = nn.Parameter(torch.randn(48)), nn.Parameter(torch.randn(48))
    adapted.channels_first = False
    query, key = torch.randn(3, 1, 16), torch.randn(3, 6, 16)
    found = adapted(query, key, key)
    adapted.merge()
    torch.testing.assert_close(found, adapted(query, key, key), atol=1e-5, rtol=1e-5)


def test_a_convnext_without_linear_layers() -> None:
    model = timm.create_model("convnext_tiny", depths=(1,) * 4, dims=(8,) * 4, conv_mlp=True, num_classes=0)
    assert trainable_parameters(inject(model, SSF())) > 0

"""Where an adapter goes: every architecture's layers, patterns, ranks by layer, and the table of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from backbones import build
from torch import nn

from adapters import LoRA, adapter_table, inject, trainable_parameters
from adapters.targets import find_sites

ALL = ("q", "k", "v", "o", "fc1", "fc2")


@pytest.mark.parametrize("backbone", ["bert", "clip", "clip, own attention", "vit", "swin"])
def test_every_role_is_there_once_a_block(backbone: str) -> None:
    sites = find_sites(build(backbone), ALL)
    blocks = {"swin": 4, "clip": 6, "clip, own attention": 6}.get(backbone, 3)
    assert {role: sum(site.role == role for site in sites) for role in ALL} == dict.fromkeys(ALL, blocks)
    for site in sites:
        assert site.d_out in (site.d_in, 4 * site.d_in) or site.d_in == 4 * site.d_out


def test_rows_of_a_fused_layer_are_q_k_and_v_in_this_order() -> None:
    model = build("vit")
    rows = {site.role: (site.start, site.stop) for site in find_sites(model, ALL) if site.name.endswith("0.attn.qkv")}
    assert rows == {"q": (0, 32), "k": (32, 64), "v": (64, 96)}


@pytest.mark.parametrize("kind", ["clip", "vit"])
def test_the_models_of_transformers(kind: str) -> None:
    from transformers import CLIPConfig, CLIPModel, ViTConfig, ViTModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    if kind == "clip":
        model: nn.Module = CLIPModel(CLIPConfig(text_config=sizes, vision_config=sizes | {"image_size": 32}))
    else:
        model = ViTModel(ViTConfig(**sizes, image_size=32))
    sites = find_sites(model, ALL)
    assert len(sites) == 6 * 2 * (2 if kind == "clip" else 1)


def test_a_pattern_reaches_some_layers_and_those_without_a_role() -> None:
    model = build("vit")
    pattern = r"blocks\.[01]\..*\.(q|v)$|^head$"
    assert [site.key for site in find_sites(model, pattern)] == [
        *(f"backbone.blocks.{i}.attn.qkv.{role}" for i in (0, 1) for role in "qv"),
        "head",
    ]
    inject(model, LoRA(rank=2, targets=pattern))
    assert trainable_parameters(model) == 4 * 2 * (32 + 32) + 2 * (32 + 5)


def test_ranks_by_tower_and_layer() -> None:
    model = inject(build("clip"), LoRA(rank=4, rank_pattern={r"visual\..*\.0\.": 1, "visual": 2}))
    ranks = {name: len(p) for name, p in model.named_parameters() if name.endswith(".A")}
    assert {rank for name, rank in ranks.items() if "visual" not in name} == {4}
    assert {rank for name, rank in ranks.items() if "visual.transformer.resblocks.0" in name} == {1}
    assert {rank for name, rank in ranks.items() if "visual.transformer.resblocks.1" in name} == {2}
    with pytest.raises(ValueError, match="'vizual' is found in none of the targets"):
        inject(build("clip"), LoRA(rank_pattern={"vizual": 2}))


def test_no_match_names_the_closest() -> None:
    with pytest.raises(ValueError, match=r"found in no linear layer.*backbone\.blocks\.0\.attn\.qkv"):
        find_sites(build("vit"), "blocks.0.attn.qvk")
    with pytest.raises(ValueError, match="its targets are fc1, fc2"):
        find_sites(build("convnext"), ("q",))


def test_the_table_adds_up(capsys: pytest.CaptureFixture) -> None:
    model = inject(build("vit"), LoRA(rank=2, targets=("q", "fc2")), train=("head",), show=True)
    printed = capsys.readouterr().out
    assert printed.strip() == adapter_table(model)
    lines = [line.split() for line in printed.splitlines()]
    assert ["backbone.blocks.0.attn.qkv.q", "32", "->", "32", "2", "128"] in lines
    assert ["backbone.blocks.2.mlp.fc2.fc2", "128", "->", "32", "2", "320"] in lines
    own = [int(line[-1].replace(",", "")) for line in lines[1:]]
    assert sum(own[:-1]) == own[-1] == trainable_parameters(model)


def test_a_layer_at_two_paths_is_adapted_once() -> None:
    shared = nn.Linear(4, 4)
    model = inject(nn.ModuleDict({"one": shared, "two": shared}), LoRA(rank=2, targets="one|two"))
    assert trainable_parameters(model) == 2 * 8
    assert torch.isfinite(model["two"](torch.randn(3, 4))).all()


def test_a_layer_whose_weight_is_read_but_that_is_never_called_is_no_target() -> None:
    import timm

    model = timm.create_model("beit_base_patch16_224", img_size=32, embed_dim=32, num_heads=4, depth=1, num_classes=0)
    assert isinstance(model.blocks[0].attn.q_bias, nn.Parameter)
    with pytest.raises(ValueError, match="no layer for target 'q'"):
        inject(model, LoRA(targets=("q", "o")))


def torchvision_swin(block: str) -> nn.Module:
    from torchvision.models import swin_transformer as swin

    return swin.SwinTransformer([4, 4], 16, [2], [2], [4, 4], num_classes=3, block=getattr(swin, block))


def clip_resnet_pool() -> nn.Module:
    from open_clip.modified_resnet import AttentionPool2d

    return nn.ModuleDict({"attn": AttentionPool2d(2, 16, 2)})


def wavlm_attention() -> nn.Module:
    from transformers.models.wavlm.modeling_wavlm import WavLMAttention

    return nn.ModuleDict({"attention": WavLMAttention(16, 2)})


@pytest.mark.parametrize(
    ("model", "pattern"),
    [
        (lambda: torchvision_swin("SwinTransformerBlock"), r"attn\.(qkv|proj)"),
        (lambda: torchvision_swin("SwinTransformerBlockV2"), r"attn\.(qkv|proj)"),
        (clip_resnet_pool, "_proj"),
        (wavlm_attention, "_proj"),
        (lambda: nn.ModuleDict({"attn": nn.MultiheadAttention(16, 2, kdim=8, vdim=8)}), "out_proj"),
    ],
    ids=["torchvision's Swin", "v2", "CLIP's ResNet", "WavLM", "kdim"],
)
def test_layers_whose_weight_is_handed_to_a_function_are_no_targets(
    model: Callable[[], nn.Module], pattern: str
) -> None:
    with pytest.raises(ValueError, match="is found in no linear layer"):
        find_sites(model(), pattern)
    for role in "qkvo":
        with pytest.raises(ValueError, match=f"no layer for target '{role}'"):
            find_sites(model(), (role,))


class Twice(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def test_a_layer_with_a_forward_of_its_own_is_refused_before_anything_changes() -> None:
    mlp = nn.ModuleDict({"fc1": Twice(4, 4), "fc2": nn.Linear(4, 4)})
    model = nn.ModuleDict({"mlp": mlp})
    for targets in (("fc1", "fc2"), r"fc\d"):
        with pytest.raises(ValueError, match=r"mlp\.fc1\.fc1: this Twice has a forward of its own.*or leave it out"):
            inject(model, LoRA(targets=targets))
    assert all(parameter.requires_grad for parameter in model.parameters()) and type(mlp.fc2) is nn.Linear
    assert [site.role for site in find_sites(model, "")] == ["fc2"]
    inject(model, LoRA(targets=("fc2",)))

    replaced = nn.Linear(4, 4)
    replaced.forward = nn.Linear(4, 4).forward
    with pytest.raises(ValueError, match="this Linear had its forward replaced"):
        find_sites(nn.ModuleDict({"fc": replaced}), "fc")


def test_attention_with_a_forward_of_its_own_is_refused() -> None:
    class Own(nn.MultiheadAttention):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x, x, x, need_weights=False)[0]

    for role in ("q", "o"):
        with pytest.raises(ValueError, match="this Own has a forward of its own"):
            find_sites(nn.ModuleDict({"attn": Own(16, 2)}), (role,))


def test_linear_layers_of_the_libraries_that_compute_the_same_are_targets() -> None:
    from timm.layers import Linear
    from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
    from transformers.models.falcon.modeling_falcon import FalconLinear

    x, kinds = torch.randn(3, 4), (Linear, NonDynamicallyQuantizableLinear, FalconLinear)
    for kind in kinds:
        layer = kind(4, 4)
        before = layer(x)
        torch.testing.assert_close(inject(layer, LoRA(rank=2, targets="$"))(x), before)

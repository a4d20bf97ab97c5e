"""NOAH against a ViT written out: prompts at the end as published, the dense W + BA, the bottleneck after the MLP."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional as F

from adapters import NOAH, inject, load, save, stored_subspaces, trainable_parameters
from regularizers import capture

D, HEADS = 32, 4
NUMBERS: dict[str, tuple[int, ...]] = {"prompts": (2, 0, 3), "rank": (3, 1, 0), "bottleneck": (0, 4, 2)}
CONF = Path(__file__).parents[2] / "scripts" / "conf" / "table2" / "noah.yaml"


def vit(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": D, "num_heads": HEADS, "depth": 3, "num_classes": 5}
    return timm.create_model("vit_tiny_patch16_224", **(sizes | settings)).eval()


def filled(model: nn.Module, **settings: Any) -> nn.Module:
    """Adapted, with values as if trained."""
    inject(model, NOAH(**(NUMBERS | settings)))
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.5)
    return model


def parts_of(model: nn.Module, block: int) -> dict[str, Tensor]:
    """What trains in a block, by its name in it."""
    start = f"blocks.{block}."
    return {n.removeprefix(start): p.detach() for n, p in model.named_parameters() if p.requires_grad and start in n}


def after_mlp(parts: dict[str, Tensor], m: Tensor) -> Tensor:
    """m + up(f(down m)), f(z) = z sigmoid(1.702 z)."""
    down, b_down, up, b_up = (
        parts[f"drop_path2.branches.bottleneck.{name}"] for name in ("down.weight", "down.bias", "up.weight", "up.bias")
    )
    z = m @ down.T + b_down
    return m + (z / (1 + torch.exp(-1.702 * z))) @ up.T + b_up


def written_out(block: Any, parts: dict[str, Tensor], x: Tensor, scale: float = 1.0) -> Tensor:
    """A block of timm's with NOAH's parts on tokens (B, L, D), from its weights alone; `scale` is the layer scale."""
    length = x.shape[1]
    if "prompts" in parts:
        x = torch.cat([x, parts["prompts"].expand(len(x), -1, -1)], dim=1)
    weight = block.attn.qkv.weight
    if "attn.qkv.branches.qkv.A" in parts:
        weight = weight + parts["attn.qkv.branches.qkv.B"] @ parts["attn.qkv.branches.qkv.A"]
    normed = F.layer_norm(x, (D,), block.norm1.weight, block.norm1.bias, block.norm1.eps)
    q, k, v = (normed @ weight.T + block.attn.qkv.bias).chunk(3, dim=-1)
    heads = []
    for part in torch.arange(D).chunk(HEADS):
        logits = q[..., part] @ k[..., part].mT / math.sqrt(D // HEADS)
        heads.append(logits.softmax(dim=-1) @ v[..., part])
    x = x + scale * (torch.cat(heads, dim=-1) @ block.attn.proj.weight.T + block.attn.proj.bias)
    normed = F.layer_norm(x, (D,), block.norm2.weight, block.norm2.bias, block.norm2.eps)
    hidden = F.gelu(normed @ block.mlp.fc1.weight.T + block.mlp.fc1.bias)
    m = scale * (hidden @ block.mlp.fc2.weight.T + block.mlp.fc2.bias)
    x = x + (after_mlp(parts, m) if any("bottleneck" in name for name in parts) else m)
    return x[:, :length]


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, {"init_values": 0.5}, {"reg_tokens": 2}])
def test_equals_the_written_out_vit(settings: dict[str, Any]) -> None:
    stock = vit(**settings)
    for parameter in stock.parameters():  # with weights that make attention matter
        if parameter.dim() >= 2:
            parameter.normal_(std=0.25)
    model, images = filled(copy.deepcopy(stock)), torch.randn(2, 3, 32, 32)
    x = stock._pos_embed(stock.patch_embed(images))
    for index, block in enumerate(stock.blocks):
        x = written_out(block, parts_of(model, index), x, settings.get("init_values", 1.0))
    expected = stock.forward_head(stock.norm(x))
    torch.testing.assert_close(model(images), expected, atol=1e-5, rtol=1e-4)
    assert (expected - stock(images)).abs().max() > 0.05


def test_zero_is_nothing_there_and_one_number_is_for_all() -> None:
    model = inject(vit(), NOAH(**NUMBERS))
    shapes = [{name: tuple(p.shape) for name, p in parts_of(model, block).items()} for block in range(3)]
    lora = {"attn.qkv.branches.qkv.A": (3, D), "attn.qkv.branches.qkv.B": (3 * D, 3)}
    assert shapes[0] == {"prompts": (2, D), **lora}
    assert set(shapes[1]) == {f"attn.qkv.branches.qkv.{f}" for f in "AB"} | {
        f"drop_path2.branches.bottleneck.{layer}.{kind}" for layer in ("down", "up") for kind in ("weight", "bias")
    }
    assert shapes[2]["prompts"] == (3, D) and not any("qkv" in name for name in shapes[2])
    assert NOAH(rank=[1, 2, 3]) == NOAH(rank=(1, 2, 3))  # as a file's JSON and a configuration's YAML have it

    same = inject(vit(), NOAH(prompts=2, rank=0, bottleneck=[1, 1, 1]))
    assert all(parts_of(same, 0).keys() == parts_of(same, block).keys() for block in (1, 2))


def test_stochastic_depth_drops_the_mlp_before_the_bottleneck() -> None:
    model = filled(vit(drop_path_rate=0.5), dropout=0.0)
    block, x = model.blocks[1].train(), torch.randn(2, 7, D)
    block.drop_path1.drop_prob = block.drop_path2.drop_prob = 1.0
    torch.testing.assert_close(block(x), x + after_mlp(parts_of(model, 1), torch.zeros_like(x)))


@pytest.mark.parametrize("part", NUMBERS)
def test_each_part_drops_in_training_only(part: str) -> None:
    alone = dict.fromkeys(NUMBERS, 0) | {part: 3}
    images = torch.randn(2, 3, 32, 32)
    model = filled(vit(), **alone, dropout=0.5)
    assert torch.equal(model(images), model(images))
    model.train()
    assert not torch.allclose(model(images), model(images), atol=1e-5)
    without = filled(vit(), **alone, dropout=0.0)
    assert torch.equal(without.train()(images), without.eval()(images))
    torch.testing.assert_close(without(images), model.eval()(images))


def test_initial_values() -> None:
    model = inject(vit(embed_dim=768, num_heads=12, depth=2), NOAH(prompts=(10, 40), rank=7, bottleneck=10))
    for block, p in ((0, 10), (1, 40)):
        parts = parts_of(model, block)
        uniform = {
            "prompts": math.sqrt(6 / (768 * (p + 1))),
            "attn.qkv.branches.qkv.A": 1 / math.sqrt(768),
            "drop_path2.branches.bottleneck.down.weight": math.sqrt(6 / (768 + 10)),
            "drop_path2.branches.bottleneck.up.weight": math.sqrt(6 / (768 + 10)),
        }
        for name, bound in uniform.items():
            values = parts.pop(name)
            assert 0.99 * bound < values.abs().max() <= bound, name
            assert values.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03), name
        assert not parts.pop("attn.qkv.branches.qkv.B").any()
        assert set(parts) == {f"drop_path2.branches.bottleneck.{layer}.bias" for layer in ("down", "up")}
        assert all(0 < values.abs().max() < 1e-5 for values in parts.values())
    assert parts["drop_path2.branches.bottleneck.up.bias"].std().item() == pytest.approx(1e-6, rel=0.1)


def of_authors() -> dict[str, list[tuple[int, ...]]]:
    """Data set -> prompts, rank and bottleneck of the 12 blocks, from the configuration."""
    by_dataset = yaml.safe_load(CONF.read_text())["by_dataset"]
    return {name: [tuple(three[part]) for part in NUMBERS] for name, three in by_dataset.items()}


def test_published_counts_on_vit_b16() -> None:
    """A block has 768 p + 3072 r + (1537 a + 768 where a > 0); the 19 networks released for VTAB-1K have 360,134."""
    with torch.device("meta"):
        vit_b = timm.create_model("vit_base_patch16_224", num_classes=0)
    released, counts = of_authors(), {}
    assert len(released) == 19 and {n for three in released.values() for part in three for n in part} == {1, 5, 10}
    with_zeros = [tuple(range(12)), (0, 3) * 6, (2, 0, 0) * 4]
    for name, three in {**released, "with zeros": with_zeros}.items():
        expected = sum(768 * p + 3072 * r + (1537 * a + 768 if a else 0) for p, r, a in zip(*three, strict=True))
        counts[name] = trainable_parameters(
            inject(copy.deepcopy(vit_b), NOAH(**dict(zip(NUMBERS, three, strict=True))))
        )
        assert counts[name] == expected, name
    assert counts["cifar"] == 320_330
    assert round(sum(counts[name] for name in released) / 19) == 360_134


def test_subspaces_are_loras_and_the_bottlenecks(tmp_path: Path) -> None:
    model, seen = filled(vit(), dropout=0.0).train(), {}
    for block in (0, 1):
        layer = model.blocks[block].attn.qkv
        branch, name = layer.branches.qkv, f"blocks.{block}.attn.qkv.qkv"
        layer.register_forward_pre_hook(
            lambda _, args, branch=branch, name=name: seen.update({name: args[0] @ branch.A.T @ branch.B.T})
        )
    for block in (1, 2):
        bottleneck, name = model.blocks[block].drop_path2.branches.bottleneck, f"blocks.{block}.drop_path2.bottleneck"
        bottleneck.register_forward_hook(lambda own, _, out, name=name: seen.update({name: out - own.up.bias}))
    with capture(model) as subspaces:
        model(torch.randn(2, 3, 32, 32))
    assert set(subspaces) == set(seen) and len(seen) == 4
    for name, (activations, basis) in subspaces.items():
        torch.testing.assert_close(activations @ basis, seen[name].flatten(0, 1), atol=1e-5, rtol=1e-4)
    assert subspaces["blocks.0.attn.qkv.qkv"].activations.shape == (2 * 19, 3)  # 17 tokens and 2 prompts
    assert subspaces["blocks.0.attn.qkv.qkv"].basis.shape == (3, 3 * D)
    sum(pair.activations.square().sum() for pair in subspaces.values()).backward()
    assert model.blocks[0].prompts.grad.abs().sum() > 0

    save(model, tmp_path / "a.safetensors")
    stored = stored_subspaces(tmp_path / "a.safetensors")
    with capture(model, on="weights") as weights:
        pass
    assert set(stored) == set(weights) == set(seen)
    for name, pair in weights.items():
        for ours, theirs in zip(stored[name], pair, strict=True):
            torch.testing.assert_close(ours, theirs)
    assert stored.rest == ("blocks.0.prompts", "blocks.2.prompts")


def test_a_file_brings_its_numbers(tmp_path: Path) -> None:
    model, images = filled(vit()), torch.randn(2, 3, 32, 32)
    save(model, tmp_path / "a.safetensors")
    loaded = load(vit(), tmp_path / "a.safetensors")
    assert loaded.injection.adapter == NOAH(**NUMBERS)
    assert torch.equal(loaded.eval()(images), model(images))
    load(loaded, tmp_path / "a.safetensors")  # the numbers are compared as tuples


@pytest.mark.parametrize(
    "settings",
    [
        {"prompts": -1},
        {"rank": (1, -1)},
        {"bottleneck": 2.0},
        {"rank": "5"},
        {"prompts": 0, "rank": (0, 0), "bottleneck": ()},
        {"dropout": 1.0},
        {"dropout": -0.1},
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"noah needs prompts, rank, bottleneck >= 0.* 0 <= dropout < 1, but got NOAH"):
        NOAH(**settings)


def test_what_it_does_not_work_on_is_refused_and_left_as_it_was() -> None:
    message = r"noah with bottleneck=\(1, 2\) has 2 numbers, but the model has 3 blocks: give each block one"
    with torch.device("meta"):
        refused = [
            (vit(), {"bottleneck": (1, 2)}, message),
            (timm.create_model("swin_tiny_patch4_window7_224"), {}, "noah works on towers of kind vit, but .* swin"),
            (timm.create_model("beit_base_patch16_224"), {}, "noah works on ViTs whose blocks know no positions"),
            (timm.create_model("eva02_tiny_patch14_224"), {}, "noah works on ViTs whose blocks know no positions"),
            (vit(), {}, r"noah goes into a block's drop_path2, but blocks.1 \(Block\) has norm1, attn"),
        ]
        del refused[-1][0].blocks[1].drop_path2
    for model, settings, words in refused:
        before = {name: type(module) for name, module in model.named_modules()}
        with pytest.raises(ValueError, match=words):
            inject(model, NOAH(**settings))
        assert {name: type(module) for name, module in model.named_modules()} == before

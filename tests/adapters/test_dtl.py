"""DTL and DTL+ against the formula, looped over the stock model's own blocks, and the published counts."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adapters import DTL, DTLPlus, inject, load, save, stored_subspaces, trainable_parameters
from regularizers import capture

D = 32


def vit(depth: int = 4, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    settings = {"img_size": (16, 24), "patch_size": 8, "num_classes": 0, "global_pool": "avg"} | settings
    model = timm.create_model("vit_tiny_patch16_224", embed_dim=D, num_heads=4, depth=depth, **settings)
    return model.eval()


def swin(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    settings = {"embed_dim": 8, "depths": (2, 3, 2), "num_heads": (1, 2, 4), "num_classes": 0} | settings
    return timm.create_model("swin_tiny_patch4_window7_224", img_size=64, window_size=4, **settings).eval()


def filled(model: nn.Module) -> nn.Module:
    """What trains gets values, as if trained; H is then of the size of the tokens, on both sides of the gate."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return model


def pair(state: dict[str, Tensor], block: str) -> tuple[Tensor, Tensor]:
    return state[f"{block}.branches.side.A"], state[f"{block}.branches.side.B"]


def gate(h: Tensor) -> Tensor:
    return h / (1 + torch.exp(-100.0 * h.double()).float())


def depthwise(weight: Tensor, image: Tensor) -> Tensor:
    """image (B, h, w, C), weight (C, 1, k, k): every channel on its own, zeros around; one more after than before."""
    k = weight.shape[-1]
    before, after = (k - 1) // 2, k // 2
    padded = F.pad(image, (0, 0, before, after, before, after))
    out = torch.zeros_like(image)
    for i in range(k):
        for j in range(k):
            out += padded[:, i : i + image.shape[1], j : j + image.shape[2]] * weight[:, 0, i, j]
    return out


@pytest.mark.parametrize("registers", [0, 3])
@pytest.mark.parametrize("kernel", [None, 3, 4])
def test_vit_is_the_formula(kernel: int | None, registers: int) -> None:
    stock = vit(reg_tokens=registers)
    adapter = DTL(rank=2, start=1) if kernel is None else DTLPlus(rank=2, start=1, kernel=kernel)
    model = filled(inject(copy.deepcopy(stock), adapter))
    state, images = model.state_dict(), torch.randn(3, 3, 16, 24)

    x = stock.norm_pre(stock._pos_embed(stock.patch_embed(images)))
    h = torch.zeros_like(x)
    for i, block in enumerate(stock.blocks):
        a, b = pair(state, f"blocks.{i}")
        h = h + x @ a.T @ b.T
        x = block(x)
        if i >= 1:
            g = gate(h)
            if kernel is not None:
                patches = g[:, 1 + registers :].reshape(3, 2, 3, D)
                mixed = depthwise(state[f"blocks.{i}.mix.conv.weight"], patches).reshape(3, 6, D)
                g = torch.cat([g[:, : 1 + registers], mixed], dim=1)
            x = x + g
    torch.testing.assert_close(model.forward_features(images), stock.norm(x), atol=1e-4, rtol=1e-4)
    readout = stock.fc_norm(x[:, 1 + registers :].mean(dim=1))  # the mean of the patches, then the norm
    torch.testing.assert_close(model(images), readout, atol=1e-4, rtol=1e-4)
    assert (model(images) - stock(images)).abs().max() > 0.1  # so that the comparison is one


@pytest.mark.parametrize(("start", "first"), [(None, 2), (3, 2), (5, 5)])
@pytest.mark.parametrize("kernel", [None, 3])
def test_swin_is_the_formula_with_h_from_zero_in_each_stage(kernel: int | None, start: int | None, first: int) -> None:
    """Depths 2, 3, 2: by default additions from block 7 * 7 // 12 = 4; pairs from the first block of its stage."""
    stock = swin()
    adapter = DTL(rank=3, start=start) if kernel is None else DTLPlus(rank=3, start=start, kernel=kernel)
    model = filled(inject(copy.deepcopy(stock), adapter))
    state, images, number, pairs = model.state_dict(), torch.randn(2, 3, 64, 64), 0, 0

    x = stock.patch_embed(images)
    for s, stage in enumerate(stock.layers):
        x = stage.downsample(x)
        h = torch.zeros_like(x)
        for i, block in enumerate(stage.blocks):
            path = f"layers.{s}.blocks.{i}"
            if number >= first:
                a, b = pair(state, path)
                h, pairs = h + x @ a.T @ b.T, pairs + 1
            x = block(x)
            if number >= (4 if start is None else start):
                x = x + (gate(h) if kernel is None else depthwise(state[f"{path}.mix.conv.weight"], gate(h)))
            number += 1
    torch.testing.assert_close(model.forward_features(images), stock.norm(x), atol=1e-4, rtol=1e-4)
    assert pairs == sum(name.endswith("side.A") for name in state)
    assert not torch.allclose(model(images), stock(images), atol=0.1)


def test_published_counts_on_vit_b16() -> None:
    """0.04 M in Table 2 of the paper; DTL+ by its kernel."""
    for adapter, count in (
        (DTL(), 36_864),
        (DTLPlus(kernel=3), 43_776),
        (DTLPlus(kernel=4), 49_152),
        (DTLPlus(kernel=5), 56_064),
    ):
        with torch.device("meta"):
            model = timm.create_model("vit_base_patch16_224", num_classes=0)
        assert trainable_parameters(inject(model, adapter)) == count
        adds = [i for i, block in enumerate(model.blocks) if block.adds]
        assert adds == list(range(6, 12))


def test_published_counts_on_swin_b() -> None:
    """DTL: 0.09 M in Table 3. DTL+ at k = 5 has no convolutions in the two stages where nothing is added: the published
    code makes them nevertheless, (128 + 256) * 25 = 9,600 parameters more than ours, and counts 138,112."""
    for adapter, count in ((DTL(rank=4), 90_112), (DTLPlus(rank=4, kernel=5), 138_112 - (128 + 256) * 25)):
        with torch.device("meta"):
            model = timm.create_model("swin_base_patch4_window7_224", num_classes=0)
        assert trainable_parameters(inject(model, adapter)) == count
        blocks = [block for stage in model.layers for block in stage.blocks]
        assert [i for i, block in enumerate(blocks) if hasattr(block, "branches")] == list(range(4, 24))
        assert [i for i, block in enumerate(blocks) if getattr(block, "adds", False)] == list(range(14, 24))
        assert [i for i, block in enumerate(blocks) if getattr(block, "last", False)] == [21, 23]


def test_initial_values() -> None:
    model = inject(vit(depth=3), DTLPlus(rank=16, kernel=3))
    a = torch.cat([block.branches["side"].A.detach() for block in model.blocks])
    assert a.abs().max() <= 1 / math.sqrt(D) and a.std() == pytest.approx(1 / math.sqrt(3 * D), rel=0.1)
    assert not any(block.branches["side"].B.any() for block in model.blocks)
    weight = model.blocks[-1].mix.conv.weight.detach()  # nn.Conv2d's own: uniform in +-1/sqrt(k * k)
    assert weight.abs().max() <= 1 / 3 and weight.std() == pytest.approx(1 / math.sqrt(27), rel=0.15)
    assert model.blocks[1].mix is model.blocks[2].mix and model.blocks[0].mix is None


@pytest.mark.parametrize("checkpointed", [False, True])
def test_blocks_before_the_first_addition_keep_nothing(checkpointed: bool) -> None:
    """Blocks 0 to `start` have no trained input: what their sublayers put out is part of no graph."""
    model = filled(inject(vit(depth=5), DTLPlus(start=2))).train()
    model.set_grad_checkpointing(checkpointed)
    of_graph: dict[str, bool] = {}
    for i, block in enumerate(model.blocks):
        for part in ("norm1", "attn", "norm2", "mlp"):
            name = f"{i}.{part}"
            block.get_submodule(part).register_forward_hook(
                lambda module, args, output, name=name: of_graph.update({name: output.requires_grad})
            )
    saved: list[tuple[int, ...]] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model(torch.randn(2, 3, 16, 24))
    assert len(of_graph) == 20
    assert of_graph == {name: int(name[0]) > 2 for name in of_graph}
    hidden = saved.count((2, 7, 4 * D))  # the inputs of GELU, in blocks 3 and 4 alone
    assert hidden == (0 if checkpointed else 2)
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("build", [vit, swin])
def test_subspaces_are_the_pairs(build: Any, tmp_path: Path) -> None:
    """Captured: x A^T of what goes into the block. In the file and on weights: A^T and B^T."""
    model = filled(inject(build(), DTLPlus(rank=3)))
    blocks = {name: m for name, m in model.named_modules() if hasattr(m, "branches")}
    inputs: dict[str, Tensor] = {}
    for name, block in blocks.items():
        block.register_forward_pre_hook(
            lambda module, args, name=name: inputs.update({name: args[0][0] if type(args[0]) is tuple else args[0]})
        )
    with capture(model) as subspaces:
        model(torch.randn(2, 3, *model.patch_embed.img_size))
    assert list(subspaces) == [f"{name}.side" for name in blocks]
    for name, block in blocks.items():
        a, b = block.branches["side"].A, block.branches["side"].B
        found = subspaces[f"{name}.side"]
        torch.testing.assert_close(found.activations, (inputs[name] @ a.T).flatten(0, -2))
        torch.testing.assert_close(found.basis, b.T)

    save(model, tmp_path / "a.safetensors")
    stored = stored_subspaces(tmp_path / "a.safetensors")
    with capture(model, on="weights") as of_weights:
        pass
    assert set(stored) == set(of_weights) == set(subspaces)
    for name, block in blocks.items():
        for activations, basis in (stored[f"{name}.side"], of_weights[f"{name}.side"]):
            assert torch.equal(activations.T, block.branches["side"].A) and torch.equal(
                basis.T, block.branches["side"].B
            )
    assert stored.rest and all(name.endswith("mix.conv.weight") for name in stored.rest)


def test_a_shared_convolution_is_saved_once_and_stays_shared(tmp_path: Path) -> None:
    model, x = filled(inject(vit(), DTLPlus())), torch.randn(1, 3, 16, 24)
    save(model, tmp_path / "a.safetensors")
    assert len(stored_subspaces(tmp_path / "a.safetensors").rest) == 1
    for same in (load(vit(), tmp_path / "a.safetensors"), copy.deepcopy(model)):
        assert same.blocks[2].mix is same.blocks[3].mix
        assert torch.equal(same(x), model(x))


def test_blocks_that_take_more_than_tokens_and_images_of_other_sizes() -> None:
    """EVA's blocks are called with rotary positions; DTL itself needs no grid."""
    settings = {"img_size": 32, "patch_size": 8, "embed_dim": D, "depth": 4, "num_heads": 4, "num_classes": 0}
    eva = timm.create_model("eva02_tiny_patch14_224", **settings).eval()
    x = torch.randn(2, 3, 32, 32)
    before = eva(x)
    inject(eva, DTLPlus())
    torch.testing.assert_close(eva(x), before)
    assert not torch.allclose(filled(eva)(x), before, atol=0.1)

    model = filled(inject(vit(dynamic_img_size=True), DTL()))
    assert model(torch.randn(2, 3, 32, 16)).shape == (2, D)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="dtl needs rank >= 1"):
        DTL(rank=0)
    with pytest.raises(ValueError, match="dtl_plus needs rank >= 1 and start >= 0"):
        DTLPlus(start=-1)
    with pytest.raises(ValueError, match="dtl_plus needs kernel >= 1"):
        DTLPlus(kernel=0)
    with pytest.raises(ValueError, match="dtl with start=4: the model has blocks 0 to 3"):
        inject(vit(), DTL(start=4))
    with pytest.raises(ValueError, match="dtl_plus needs a fixed grid"):
        inject(vit(dynamic_img_size=True), DTLPlus())
    model = inject(vit(patch_drop_rate=0.5), DTLPlus()).train()
    with pytest.raises(ValueError, match=r"1 \+ 2 x 3 tokens, but got 4"):
        model(torch.randn(1, 3, 16, 24))

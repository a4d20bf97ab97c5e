"""MoSLoRA against W + B M A computed on its own, and its published count."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from adapters import MoSLoRA, inject, merge, trainable_parameters
from regularizers import capture

D = 32


@pytest.fixture
def vit() -> nn.Module:
    import timm

    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, embed_dim=D, num_heads=4, depth=2, num_classes=5
    ).eval()


def test_equals_the_formula_on_stock_weights_and_merges_to_it(vit: nn.Module) -> None:
    stock, x = copy.deepcopy(vit), torch.randn(2, 3, 32, 32)
    inject(vit, MoSLoRA(rank=4, alpha=8, targets=("q", "v", "fc2")))
    for name, parameter in vit.named_parameters():
        if name.endswith(".B"):
            nn.init.normal_(parameter, std=0.2)
    for name, module in stock.named_modules():
        for suffix, role, rows in (("attn.qkv", "q", 0), ("attn.qkv", "v", 2), ("mlp.fc2", "fc2", 0)):
            if name.endswith(suffix):
                branch = vit.get_submodule(f"{name}.branches.{role}")
                module.weight.data[rows * D : (rows + 1) * D] += 8 / 4 * branch.B.data @ branch.M.data @ branch.A.data
    torch.testing.assert_close(vit(x), stock(x), atol=1e-5, rtol=1e-5)
    merge(vit)
    for name, parameter in stock.named_parameters():
        torch.testing.assert_close(vit.get_parameter(name), parameter, atol=1e-6, rtol=1e-6)


def test_the_mixer_belongs_to_the_activations(vit: nn.Module) -> None:
    inject(vit, MoSLoRA(rank=4, alpha=8, targets=("fc1",)))
    inputs: list[torch.Tensor] = []
    layer = vit.get_submodule("blocks.1.mlp.fc1")
    layer.register_forward_hook(lambda module, args, output: inputs.append(args[0].flatten(0, -2)))
    with capture(vit) as subspaces:
        vit(torch.randn(2, 3, 32, 32))
    found, branch = subspaces["blocks.1.mlp.fc1.fc1"], layer.branches["fc1"]
    torch.testing.assert_close(found.activations, 2.0 * inputs[0] @ branch.A.T @ branch.M.T)
    torch.testing.assert_close(found.basis, branch.B.T)


def test_count_on_vit_b16() -> None:
    """LoRA's 442,368 and 36 mixers of 64."""
    import timm

    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", num_classes=0)
    assert trainable_parameters(inject(model, MoSLoRA(rank=8, targets=("q", "k", "v")))) == 444_672


def test_initial_values() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"mlp": nn.ModuleDict({"fc1": nn.Linear(100, 80)})})
    branch = inject(model, MoSLoRA(rank=25, targets=("fc1",))).mlp.fc1.branches.fc1
    assert not branch.B.any()
    for factor, columns in ((branch.A, 100), (branch.M, 25)):
        assert factor.abs().max() <= 1 / math.sqrt(columns)
        assert factor.detach().std() == pytest.approx(1 / math.sqrt(3 * columns), rel=0.1)  # of a uniform distribution

"""Dropout of low-rank branches: of their inputs alone, as torch drops them, also in what is captured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adapters import NOAH, AdaLoRA, Adapter, LoRA, MoSLoRA, inject
from regularizers import capture

P, SETTINGS = 0.3, {"rank": 4, "alpha": 8, "targets": ("fc1",), "dropout": 0.3}  # alpha / rank = 2
FC1, QKV = ("blocks.0.mlp.fc1", "fc1"), ("blocks.0.attn.qkv", "qkv")

# The adapter, its layer and role there, and the activations (..., r) of inputs (..., d_in) of which some are dropped.
CASES: dict[str, tuple[Adapter, tuple[str, str], Callable[[Tensor, Any], Tensor]]] = {
    "lora": (LoRA(**SETTINGS), FC1, lambda x, branch: 2 * x @ branch.A.T),
    "moslora": (MoSLoRA(**SETTINGS), FC1, lambda x, branch: 2 * x @ branch.A.T @ branch.M.T),
    "adalora": (AdaLoRA(**SETTINGS), FC1, lambda x, branch: 8 / (4 + 1e-5) * (x @ branch.A.T) * branch.E),
    "noah": (NOAH(prompts=0, rank=4, bottleneck=0, dropout=P), QKV, lambda x, branch: x @ branch.A.T),
}


@torch.no_grad()
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_inputs_of_a_branch_are_dropped_in_training(name: str, training: bool) -> None:
    adapter, (path, role), activations = CASES[name]
    torch.manual_seed(1)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=32, num_heads=4, depth=1)
    model = inject(vit, adapter).train(training)
    layer, x = model.get_submodule(path), torch.randn(3, 7, 32)
    branch = layer.branches[role]
    for parameter in branch.parameters():
        nn.init.normal_(parameter)

    torch.manual_seed(0)
    with capture(model) as subspaces:
        out = layer(x)
    torch.manual_seed(0)
    dropped = F.dropout(x, P, training)
    assert bool((dropped == 0).any()) == training
    expected = activations(dropped, branch)
    found = subspaces[f"{path}.{role}"]
    torch.testing.assert_close(found.activations, expected.flatten(0, 1), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(out, F.linear(x, layer.weight, layer.bias) + expected @ branch.B.T, atol=1e-4, rtol=1e-5)
    torch.manual_seed(0)
    assert torch.equal(layer(x), out), "whether someone captures or not"

"""What `inject` leaves behind when it fails, and what holds for models that have an adapter somewhere inside."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from backbones import vit
from torch import Tensor, nn

from adapters import AdaLoRA, DTLPlus, Full, adapter_parameter_names, after_step, inject, loss_parts
from adapters.extend import Extension, extend


class Doubled(Extension):
    added = ("twice", "never")

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@dataclass(frozen=True, kw_only=True)
class Fails:
    """Stops in the middle: one layer extended, another one half, and a weight of the backbone switched on."""

    name: ClassVar[str] = "fails"
    not_mergeable: ClassVar[str] = ""

    def apply(self, model: nn.Module) -> None:
        for layer in model[:2]:
            extend(layer, Doubled).twice = nn.Parameter(torch.ones(1))
        model[0].never = True
        model[2].requires_grad_(True)
        raise KeyboardInterrupt


def described(model: nn.Module) -> tuple[list[type], dict[str, bool], list[set[str]]]:
    """Classes, which parameters train, and attributes of all modules."""
    modules = list(model.modules())
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    return [type(module) for module in modules], flags, [set(vars(module)) for module in modules]


def test_an_interrupted_injection_leaves_no_trace() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    model[1].requires_grad_(False)
    before, x = described(model), torch.randn(2, 4)
    expected = model(x)
    with pytest.raises(KeyboardInterrupt):
        inject(model, Fails())
    assert described(model) == before and torch.equal(model(x), expected)
    inject(model, Full())


def test_a_refusal_in_the_second_tower_leaves_the_first_alone() -> None:
    model = nn.ModuleList([vit(), vit()])
    del model[1].backbone.patch_embed  # without it nobody knows how the tokens lie in the image
    before = described(model)
    with pytest.raises(ValueError, match="no patch_embed with a grid_size"):
        inject(model, DTLPlus())
    assert described(model) == before


class Classifier(nn.Module):
    """Two encoders that had adapters injected before, and a head."""

    def __init__(self) -> None:
        super().__init__()
        adapter = AdaLoRA(rank=4, target_rank=1, targets=("fc1",), initial_warmup=0.0, final_tuning=0.0)
        self.encoders = nn.ModuleList(
            inject(nn.ModuleDict({"mlp": nn.ModuleDict({"fc1": nn.Linear(6, 5)})}), adapter) for _ in range(2)
        )
        self.head = nn.Linear(5, 2)


def test_adapters_inside_a_model_keep_their_penalty_and_their_schedule() -> None:
    """The penalty of each is the mean of |F F^T - I| over its two factors, weighted by one half."""
    model = Classifier()
    branches = [encoder.mlp.fc1.branches.fc1 for encoder in model.encoders]
    factors = [factor for branch in branches for factor in (branch.A, branch.B.T)]
    expected = sum((factor @ factor.T - torch.eye(4)).square().sum().sqrt() / 2 for factor in factors) / 2
    parts = loss_parts(model)
    torch.testing.assert_close(parts, {"adalora_orthogonality": expected})

    parts["adalora_orthogonality"].backward()
    after_step(model, 8, 8)
    assert [int(branch.alive.sum()) for branch in branches] == [1, 1]


def test_parameters_of_adapters_inside_a_model_are_named_from_its_root() -> None:
    expected = {f"encoders.{i}.mlp.fc1.branches.fc1.{factor}" for i in range(2) for factor in "AEB"}
    assert adapter_parameter_names(Classifier()) == expected

"""What is captured in every cell that has subspaces: the layer's own delta, with a gradient."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from backbones import build, inputs
from cells import (
    MERGES,
    SUBSPACES,
    WORKS,
    filled,
    subspaces_of,
    trained,
    weight_of,
)
from torch import Tensor

from adapters import merge
from regularizers import REGULARIZERS, ReSoRA, capture


@pytest.mark.parametrize(("method", "backbone"), [cell for cell in WORKS if cell[0] in SUBSPACES])
def test_subspaces_are_captured_with_their_gradient(method: str, backbone: str) -> None:
    model = trained(method, backbone).train()
    with capture(model) as subspaces:
        model(*inputs(backbone))
    assert set(subspaces) == subspaces_of(model)
    for name, pair in subspaces.items():
        layer, _, role = name.rpartition(".")
        branch = tuple(model.get_submodule(layer).branches[role].parameters())
        for part in (pair.activations, pair.basis):
            assert part.requires_grad, name
            gradients = torch.autograd.grad(part.square().sum(), branch, retain_graph=True, allow_unused=True)
            assert any(gradient is not None and gradient.any() for gradient in gradients), name
    for module in model.modules():
        assert getattr(module, "record", None) is None


@pytest.mark.parametrize("measure", REGULARIZERS)
@pytest.mark.parametrize(("method", "backbone"), [cell for cell in WORKS if cell[0] in SUBSPACES])
def test_every_penalty_can_be_lowered(method: str, backbone: str, measure: str) -> None:
    """By a step along its gradient, if it is small enough."""
    model = filled(method, backbone).double()
    x = tuple(each.double() if each.is_floating_point() else each for each in inputs(backbone))
    resora = ReSoRA(measure, weight=1.0)

    def penalty() -> Tensor:
        with resora.capture(model) as subspaces:
            model(*x)
        return sum(resora(subspaces).values())

    first = penalty()
    trains = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(first, trains, allow_unused=True)
    norm = sum(g.square().sum() for g in gradients if g is not None).sqrt()
    before = [parameter.detach().clone() for parameter in trains]

    @torch.no_grad()
    def after(step: float) -> Tensor:
        for parameter, old, gradient in zip(trains, before, gradients, strict=True):
            parameter.copy_(old if gradient is None else old - step * gradient / norm)
        return penalty()

    assert any(after(step) < first for step in (1e-2, 1e-3, 1e-4))


@pytest.mark.parametrize(("method", "backbone"), [cell for cell in MERGES if cell[0] in SUBSPACES])
def test_captured_deltas_are_those_of_the_merged_weights(method: str, backbone: str) -> None:
    """activations @ basis = x (W_merged - W_stock)^T, with x seen by a hook."""
    model, stock, x = filled(method, backbone), build(backbone), inputs(backbone)
    seen: dict[str, Tensor] = {}
    with capture(model) as subspaces, torch.no_grad():
        layers = {name.rpartition(".")[0] for name in subspaces_of(model)}
        hooks = [
            model.get_submodule(layer).register_forward_pre_hook(
                lambda _, args, kwargs, layer=layer: seen.update({layer: next(iter((*args, *kwargs.values())))}),
                with_kwargs=True,
            )
            for layer in layers
        ]
        model(*x)
    for hook in hooks:
        hook.remove()
    merged = merge(copy.deepcopy(model))
    assert layers and set(subspaces) == subspaces_of(model)
    for name, (activations, basis) in subspaces.items():
        layer, _, role = name.rpartition(".")
        update = weight_of(merged.get_submodule(layer), role) - weight_of(stock.get_submodule(layer), role)
        delta = samples(seen[layer], layer, backbone, x) @ update.T
        torch.testing.assert_close(
            activations @ basis, delta.detach(), atol=1e-4 * delta.detach().abs().max().item(), rtol=0
        )


@pytest.mark.parametrize(("method", "backbone"), [c for c in WORKS if c[0] in SUBSPACES and c not in MERGES])
def test_captured_deltas_are_what_the_branch_adds(method: str, backbone: str) -> None:
    """A bottleneck's output without the bias; the product of DTL's input with its two factors."""
    model, x = filled(method, backbone), inputs(backbone)
    seen: dict[str, Tensor] = {}
    for name in subspaces_of(model):
        layer, _, role = name.rpartition(".")
        owner = model.get_submodule(layer)
        if role == "side":
            a, b = owner.branches[role].A, owner.branches[role].B
            owner.register_forward_pre_hook(
                lambda _, args, name=name, a=a, b=b: seen.update({name: _tensor(args) @ a.T @ b.T})
            )
        else:
            owner.branches[role].register_forward_hook(
                lambda module, _, out, name=name: seen.update(
                    {name: out.movedim(module.channels, -1) - module.scale * module.up.bias}
                )
            )
    with capture(model) as subspaces, torch.no_grad():
        model(*x)
    assert subspaces and set(subspaces) == set(seen)
    for name, (activations, basis) in subspaces.items():
        delta = samples(seen[name], name, backbone, x)
        torch.testing.assert_close(
            activations @ basis, delta.detach(), atol=1e-4 * delta.detach().abs().max().item(), rtol=0
        )


def samples(values: Tensor, name: str, backbone: str, x: tuple[Tensor, ...]) -> Tensor:
    """(..., d) -> (N, d) without padding: what BERT's mask leaves out, and what follows the end of CLIP's texts."""
    if backbone == "bert":
        return values[x[1].bool()]
    if backbone.startswith("clip") and ".visual." not in name:
        ends = x[1].argmax(dim=1, keepdim=True)
        return values[torch.arange(x[1].shape[1]) <= ends]
    return values.flatten(0, -2)


def _tensor(value: Any) -> Tensor:
    """The first tensor of what a block was given: x, or x and a stream."""
    return value if isinstance(value, Tensor) else _tensor(value[0])

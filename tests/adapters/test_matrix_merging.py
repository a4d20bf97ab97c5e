"""Merging in every cell: the stock model, the same outputs and the weights of the formulas, or a reason why not."""

from __future__ import annotations

import copy

import pytest
import torch
from backbones import build, inputs
from cells import (
    BFLOAT16,
    MERGES,
    SUBSPACES,
    WHOLE,
    WORKS,
    adapted,
    configured,
    filled,
    subspaces_of,
    weight_of,
)
from torch import Tensor

from adapters import inject, merge


@pytest.mark.parametrize(("method", "backbone"), MERGES)
def test_merging_gives_the_stock_model(method: str, backbone: str) -> None:
    model, stock, x = filled(method, backbone), build(backbone), inputs(backbone)
    expected = model(*x).detach()
    tolerance = {"atol": 1e-5 * float(expected.abs().max()), "rtol": 1e-5}
    assert method in WHOLE or (expected - stock(*x)).norm() > 0.05 * expected.norm(), "there is something to merge"
    merge(model)
    torch.testing.assert_close(model(*x), expected, **tolerance)
    assert {name: type(m) for name, m in model.named_modules()} == {name: type(m) for name, m in stock.named_modules()}
    stock.load_state_dict(model.state_dict(), strict=True)
    torch.testing.assert_close(stock(*x), expected, **tolerance)
    with pytest.raises(ValueError, match="merged into its weights"):
        inject(model, configured(method, backbone))


@pytest.mark.parametrize(("method", "backbone"), MERGES)
def test_merging_in_bfloat16_changes_little(method: str, backbone: str) -> None:
    """A merged weight is rounded once; before, weight and update were, each for itself."""
    model, stock = filled(method, backbone).bfloat16(), build(backbone).bfloat16()
    x = tuple(each.bfloat16() if each.is_floating_point() else each for each in inputs(backbone))
    expected = model(*x).float()
    assert method in WHOLE or (expected - stock(*x).float()).norm() > 2 * BFLOAT16 * expected.norm()
    merged = merge(model)(*x).float()
    assert (merged - expected).norm() < BFLOAT16 * expected.norm()


@pytest.mark.parametrize(("method", "backbone"), MERGES)
def test_merging_under_autocast_is_the_same(method: str, backbone: str) -> None:
    model = filled(method, backbone)
    expected = merge(copy.deepcopy(model)).state_dict()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        merge(model)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, expected[name]), name


@pytest.mark.parametrize(("method", "backbone"), MERGES)
def test_merging_in_float64_is_exact(method: str, backbone: str) -> None:
    model = filled(method, backbone).double()
    x = tuple(each.double() if each.is_floating_point() else each for each in inputs(backbone))
    expected = model(*x).detach()
    torch.testing.assert_close(merge(model)(*x), expected, atol=1e-12 * float(expected.abs().max()), rtol=1e-10)


@pytest.mark.parametrize(("method", "backbone"), [cell for cell in MERGES if cell[0] in SUBSPACES])
def test_merged_weights_are_those_of_the_formula(method: str, backbone: str) -> None:
    model, stock = filled(method, backbone), build(backbone)
    updates = {}
    for name in subspaces_of(model):
        layer, _, role = name.rpartition(".")
        branch = {n: p.detach().clone() for n, p in model.get_submodule(layer).branches[role].named_parameters()}
        updates[layer, role] = by_hand(method, branch)
    merge(model)
    assert updates
    for (layer, role), update in updates.items():
        expected = weight_of(stock.get_submodule(layer), role) + update
        torch.testing.assert_close(weight_of(model.get_submodule(layer), role), expected, atol=1e-5, rtol=1e-5)


def by_hand(method: str, branch: dict[str, Tensor]) -> Tensor:
    """dW (d_out, d_in) of the papers' formulas, at rank 3 with alpha = 8 or FacT's scale of 1."""
    if method == "lora":
        return 8 / 3 * branch["B"] @ branch["A"]
    if method == "moslora":
        return 8 / 3 * branch["B"] @ branch["M"] @ branch["A"]
    if method == "adalora":
        return 8 / (3 + 1e-5) * branch["B"] @ torch.diag(branch["E"]) @ branch["A"]
    u, v = branch["shared.U"], branch["shared.V"]
    if method == "fact_tt":
        cores = list(branch["S"].T.split(3))  # one for each block of inputs, which fc2 has four of
    else:
        cores = [sum(c * p for c, p in zip(branch["shared.C"].unbind(2), weights, strict=True))
                 for weights in branch["P"].T]  # fmt: skip
    return torch.cat([(u.T @ core @ v.T).T for core in cores], dim=1)


@pytest.mark.parametrize(("method", "backbone"), [cell for cell in WORKS if cell not in MERGES])
def test_what_cannot_merge_says_why(method: str, backbone: str) -> None:
    model = adapted(method, backbone)
    with pytest.raises(ValueError, match=f"{method} cannot be merged: "):
        merge(model)

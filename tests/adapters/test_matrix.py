"""Every method on every architecture: the cells of the table in docs/adapters.md, none of which is only a claim."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import BACKBONES, build, inputs
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from adapters import ADAPTERS, Adapter, inject, load, merge, save
from adapters.extend import Extension
from regularizers import capture

ARCHITECTURES = {"BERT": ("bert",), "CLIP": ("clip", "clip, own attention"), "ViT": ("vit",), "Swin": ("swin",),
                 "ConvNeXt": ("convnext",)}  # fmt: skip
# Sizes that suit the small models; the defaults are the papers'.
SETTINGS: dict[str, dict[str, Any]] = {
    **{name: {"rank": 3, "targets": ("q", "v", "fc1")} for name in ("lora", "moslora", "adalora")},
    **{name: {"rank": 3, "dropout": 0.0} for name in ("fact_tt", "fact_tk")},
    "houlsby": {"bottleneck": 4},
    "adaptformer": {"bottleneck": 4, "dropout": 0.0},
    "prefix": {"prompts": 3, "hidden": 8},
    "vpt": {"prompts": 2},
    "lst": {"reduction": 2},
    "unipt": {"dim": 8},
}
NO_ATTENTION = {"targets": ("fc1", "fc2")}


def table() -> dict[str, dict[str, str]]:
    """docs/adapters.md: method -> column -> "yes" or "no: why"."""
    lines = (Path(__file__).parents[2] / "docs" / "adapters.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    rows = list(itertools.takewhile(lambda row: len(row) == len(rows[0]), rows))
    return {row[0].strip("`"): dict(zip(rows[0][1:], row[1:], strict=True)) for row in rows[2:]}


TABLE = table()
CELLS = [
    (method, backbone, row[column])
    for method, row in TABLE.items()
    for column, backbones in ARCHITECTURES.items()
    for backbone in backbones
    if method in ADAPTERS
]
WORKS = [(method, backbone) for method, backbone, cell in CELLS if cell == "yes"]
MERGES = [(method, backbone) for method, backbone in WORKS if TABLE[method]["merges"] == "yes"]


def configured(method: str, backbone: str) -> Adapter:
    settings = dict(SETTINGS.get(method, {}))
    if backbone == "convnext" and "targets" in settings:
        settings |= NO_ATTENTION
    return ADAPTERS[method](**settings)


SUBSPACES = ("lora", "moslora", "adalora", "fact_tt", "fact_tk", "dtl", "dtl_plus", "houlsby", "adaptformer")
WHOLE = ("full", "linear", "partial", "bitfit")  # no update beside the weights: they train themselves
BFLOAT16 = 0.05  # of the outputs' norm; docs/adapters.md says so


def adapted(method: str, backbone: str) -> nn.Module:
    model = build(backbone)
    torch.manual_seed(2)
    return inject(model, configured(method, backbone), train=("head",))


def trained(method: str, backbone: str, steps: int = 2) -> nn.Module:
    """A few large steps, so that nothing is at its first value."""
    model = adapted(method, backbone).train()
    for _ in _steps(model, backbone, steps):
        pass
    return model.eval()


def filled(method: str, backbone: str) -> nn.Module:
    """Everything that trains is random, so that no factor is near zero: after two steps some of AdaLoRA's and FacT's
    updates are smaller than the tolerance of a comparison."""
    model = adapted(method, backbone).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return model


def _steps(model: nn.Module, backbone: str, steps: int) -> Iterator[None]:
    """Yields between the backward pass and the step."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(*inputs(backbone)), torch.tensor([0, 1, 2])).backward()
        yield
        optimizer.step()


def test_the_table_names_every_adapter() -> None:
    assert set(ADAPTERS) == set(TABLE)


@pytest.mark.parametrize(("method", "backbone"), [(m, b) for m, b, cell in CELLS if cell != "yes"])
def test_a_no_is_an_error(method: str, backbone: str) -> None:
    with pytest.raises(ValueError, match=method):
        inject(build(backbone), configured(method, backbone))


@pytest.mark.parametrize(("method", "backbone"), WORKS)
def test_what_should_train_does_and_nothing_else(method: str, backbone: str) -> None:
    stock, model = build(backbone), adapted(method, backbone).train()
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {"head.weight", "head.bias"} <= trains
    if method != "full":
        assert any(not p.requires_grad for p in model.parameters())
    reached: set[str] = set()
    for _ in _steps(model, backbone, 2):
        reached |= {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    # At a size of three blocks not every bias of a key, say, has an influence: softmax does not see it.
    dead = {n for n in trains - reached if not _cannot_matter(n)}
    assert not dead, sorted(dead)[:5]
    assert reached <= trains
    for name, parameter in stock.named_parameters():
        if name not in trains:
            assert torch.equal(model.get_parameter(name), parameter), name


def _cannot_matter(name: str) -> bool:
    """A constant added to every key, or to each of UniPT's gates, moves logits alike; no loss has a temperature."""
    return name.endswith(("key.bias", "k_proj.bias", "gate.bias", "logit_scale"))


@pytest.mark.parametrize(("method", "backbone"), WORKS)
def test_it_starts_as_the_table_says(method: str, backbone: str) -> None:
    expected = build(backbone)(*inputs(backbone))
    actual = adapted(method, backbone)(*inputs(backbone))
    same = torch.allclose(actual, expected, atol=1e-5)
    assert same == (TABLE[method]["starts as the backbone"] == "yes")


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
        expected = _weight(stock.get_submodule(layer), role) + update
        torch.testing.assert_close(_weight(model.get_submodule(layer), role), expected, atol=1e-5, rtol=1e-5)


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


@pytest.mark.parametrize(("method", "backbone"), WORKS)
def test_a_saved_file_gives_the_same_outputs(method: str, backbone: str, tmp_path: Path) -> None:
    model, x = trained(method, backbone), inputs(backbone)
    save(model, tmp_path / "a.safetensors")
    assert torch.equal(load(build(backbone), tmp_path / "a.safetensors").eval()(*x), model(*x))
    if method != "full":
        other = build(backbone)
        for parameter in other.backbone.parameters():
            parameter.data += 1
        with pytest.raises(ValueError, match="another backbone"):
            load(other, tmp_path / "a.safetensors")


@pytest.mark.parametrize(("method", "backbone"), WORKS)
def test_copies_autocast_and_other_devices(method: str, backbone: str, tmp_path: Path) -> None:
    model, x = filled(method, backbone), inputs(backbone)
    expected = model(*x).detach()
    assert torch.equal(copy.deepcopy(model)(*x), expected)
    torch.save(model, tmp_path / "whole.pt")
    assert torch.equal(torch.load(tmp_path / "whole.pt", weights_only=False)(*x), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model(*x).detach().float()
    update = (expected - build(backbone)(*x)).norm()
    assert (half - expected).norm() < (0.1 * expected.norm() if method in WHOLE else 0.3 * update), "the update is in"

    for target in (torch.device("meta"), torch.bfloat16):
        moved = inject(build(backbone).to(target), configured(method, backbone))
        kind = {p.device.type if isinstance(target, torch.device) else p.dtype for p in moved.parameters()}
        assert kind == {"meta" if isinstance(target, torch.device) else target}


@pytest.mark.parametrize(("method", "backbone"), WORKS)
def test_gradient_checkpointing_changes_nothing(method: str, backbone: str) -> None:
    model, x = trained(method, backbone).train(), inputs(backbone)
    plain = _gradients(model, x)
    if backbone == "bert":
        model.backbone.gradient_checkpointing_enable({"use_reentrant": False})
    elif backbone == "clip, own attention":
        # by hand: open_clip 3.3.0 calls these blocks with two arguments too many, also without an adapter
        for name, module in model.named_modules():
            if re.search(r"resblocks\.\d+$", name):
                module.forward = partial(checkpoint, module.forward, use_reentrant=False)
    else:
        model.backbone.set_grad_checkpointing(True)
    checkpointed = _gradients(model, x)
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, atol=1e-5, rtol=1e-4)


def _gradients(model: nn.Module, x: tuple[Tensor, ...]) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(3)
    model(*x).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("method", "backbone"), [cell for cell in WORKS if cell[0] in SUBSPACES])
def test_subspaces_are_captured_with_their_gradient(method: str, backbone: str) -> None:
    model = trained(method, backbone).train()
    with capture(model) as subspaces:
        model(*inputs(backbone))
    assert subspaces
    sum(s.activations.square().sum() + s.basis.square().sum() for s in subspaces.values()).backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    for module in model.modules():
        assert getattr(module, "record", None) is None


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
        update = _weight(merged.get_submodule(layer), role) - _weight(stock.get_submodule(layer), role)
        real = seen[layer][x[1].bool()] if backbone == "bert" else seen[layer].flatten(0, -2)
        delta = real @ update.T
        torch.testing.assert_close(
            activations @ basis, delta.detach(), atol=1e-4 * delta.detach().abs().max().item(), rtol=0
        )


def subspaces_of(model: nn.Module) -> set[str]:
    with capture(model, on="weights") as weights:
        return set(weights)


def _weight(module: nn.Module, role: str) -> Tensor:
    """Of a role: a third of a fused layer, a part of FacT's first MLP layer, or the whole."""
    weight: Tensor = module.in_proj_weight if hasattr(module, "in_proj_weight") else module.weight
    if role in ("q", "k", "v") and len(weight) == 3 * weight.shape[1]:
        return weight.chunk(3)["qkv".index(role)]
    if role.startswith("fc1_"):
        return weight.chunk(4)[int(role.removeprefix("fc1_"))]
    return weight


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
        delta = seen[name][x[1].bool()] if backbone == "bert" else seen[name].flatten(0, -2)
        torch.testing.assert_close(
            activations @ basis, delta.detach(), atol=1e-4 * delta.detach().abs().max().item(), rtol=0
        )


def _tensor(value: Any) -> Tensor:
    """The first tensor of what a block was given: x, or x and a stream."""
    return value if isinstance(value, Tensor) else _tensor(value[0])


def test_every_backbone_is_in_the_table() -> None:
    assert {name for names in ARCHITECTURES.values() for name in names} == set(BACKBONES)
    assert Extension.added == ()

"""Every method on every architecture: the cells of the table in docs/adapters.md, none of which is only a claim."""

from __future__ import annotations

import copy
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from backbones import BACKBONES, build, in_low_precision, inputs
from cells import (
    ARCHITECTURES,
    CELLS,
    TABLE,
    WHOLE,
    WORKS,
    adapted,
    configured,
    filled,
    steps_of,
    trained,
)
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from torch.utils.checkpoint import checkpoint

from adapters import ADAPTERS, inject, load, save


def test_the_table_names_every_adapter() -> None:
    assert set(ADAPTERS) == set(TABLE)


def test_every_backbone_is_in_the_table() -> None:
    assert {name for names in ARCHITECTURES.values() for name in names} == set(BACKBONES)


@pytest.mark.parametrize(("method", "backbone"), [(m, b) for m, b, cell in CELLS if cell != "yes"])
def test_a_no_is_an_error(method: str, backbone: str) -> None:
    with pytest.raises(ValueError, match=method):
        inject(build(backbone), configured(method, backbone))


@pytest.mark.parametrize(("method", "backbone"), WORKS)
def test_what_should_train_does_and_nothing_else(method: str, backbone: str) -> None:
    stock, model = build(backbone), adapted(method, backbone).train()
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {"head.weight", "head.bias"} <= trains
    of_the_backbone = {name for name, _ in stock.named_parameters() if name in trains and not name.startswith("head.")}
    of_its_own = STOCK_TRAINS.get(method, "nothing")
    assert of_the_backbone == {
        name for name, _ in stock.backbone.named_parameters("backbone") if re.search(of_its_own, name)
    }
    reached: set[str] = set()
    for _ in steps_of(model, backbone, 2):
        reached |= {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    # At a size of three blocks not every bias of a key, say, has an influence: softmax does not see it.
    dead = {n for n in trains - reached if not _cannot_matter(n)}
    assert not dead, sorted(dead)[:5]
    assert reached <= trains
    for name, parameter in stock.named_parameters():
        if name not in trains:
            assert torch.equal(model.get_parameter(name), parameter), name


STOCK_TRAINS = {"full": "", "bitfit": r"bias[^.]*$", "partial": r"\.(visual\.proj|text_projection)$"}
"""Which of the backbone's own parameters train: a pattern of their names; nothing in the other methods."""


def _cannot_matter(name: str) -> bool:
    """A constant added to every key, or to each of UniPT's gates, moves logits alike; no loss has a temperature."""
    return name.endswith(("key.bias", "k_proj.bias", "gate.bias", "logit_scale"))


@pytest.mark.parametrize(("method", "backbone"), WORKS)
def test_it_starts_as_the_table_says(method: str, backbone: str) -> None:
    expected = build(backbone)(*inputs(backbone))
    actual = adapted(method, backbone)(*inputs(backbone))
    same = torch.allclose(actual, expected, atol=1e-5)
    assert same == (TABLE[method]["starts as the backbone"] == "yes")


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


@pytest.mark.parametrize(("method", "backbone"), WORKS)
def test_autocast_trains_with_the_same_gradients(method: str, backbone: str) -> None:
    """But for what bfloat16 rounds: a part that autocast would leave out shows at once."""
    model, x = filled(method, backbone), inputs(backbone)
    plain = _gradients(model, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = _gradients(model, x)
    assert plain.keys() == half.keys()
    whole, same = (torch.cat([each.flatten() for each in some.values()]) for some in (plain, half))
    assert cosine_similarity(whole, same, dim=0) > 0.95
    # Each that is large: of a small one little is left but what the others are rounded by.
    large = max(gradient.norm() for gradient in plain.values()) / 10
    for name, gradient in plain.items():
        if gradient.norm() > large:
            assert cosine_similarity(gradient.flatten(), half[name].flatten(), dim=0) > 0.9, name


@pytest.mark.parametrize(("method", "backbone"), WORKS)
def test_norms_in_float32_stay_beside_maps_in_bfloat16(method: str, backbone: str) -> None:
    """As open_clip and others keep a model in low precision: what is new is as the linear maps, and the step runs."""
    model = build(backbone)
    if backbone.startswith("clip"):
        model.backbone = in_low_precision(backbone)
        model.head.bfloat16()
    else:
        model.bfloat16()
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.float()
    before = {name: p.dtype for name, p in model.named_parameters()}
    inject(model, configured(method, backbone), train=("head",)).train()
    x = tuple(each.bfloat16() if each.is_floating_point() else each for each in inputs(backbone))
    model(*x).float().square().sum().backward()
    for name, parameter in model.named_parameters():
        beside = re.search(r"norm|ln_|LayerNorm|ssf_", name)  # scales and shifts of norms, and LST's copies of them
        assert parameter.dtype == before.get(name, parameter.dtype if beside else torch.bfloat16), name


def _gradients(model: nn.Module, x: tuple[Tensor, ...]) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(3)
    model(*x).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

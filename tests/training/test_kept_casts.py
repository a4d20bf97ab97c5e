"""Kept casts change no number, hold nothing where autocast would hold nothing, and follow their weights."""

from __future__ import annotations

import copy
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "adapters"))
import tiny
from backbones import inputs
from cells import WORKS, adapted

from training import KeptCasts

METHODS = ("lora", "bitfit", "adaptformer", "dtl")  # of each kind: in layers, in biases, in blocks, beside them
CELLS = [cell for cell in WORKS if cell[0] in METHODS]


class Casts(TorchDispatchMode):
    """Counts the casts of each parameter, by its address."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default:
            self.counts[args[0].data_ptr()] = self.counts.get(args[0].data_ptr(), 0) + 1
        return func(*args, **(kwargs or {}))


def under_autocast(model: nn.Module, *given: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return model(*given)


def trained(model: nn.Module, given: tuple[Tensor, ...], casts: KeptCasts | None) -> list[float]:
    """Losses of three steps."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        with casts or nullcontext():
            loss = under_autocast(model.train(), *given).float().square().mean()
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize(("method", "name"), CELLS)
def test_training_is_the_same_to_the_last_bit(method: str, name: str) -> None:
    plain = adapted(method, name)
    kept = copy.deepcopy(plain)
    losses = []
    for model in (plain, kept):
        given = inputs(name)
        torch.manual_seed(1)  # of dropout
        losses.append(trained(model, given, KeptCasts(model) if model is kept else None))
    assert losses[0] == losses[1] and len(set(losses[0])) == 3
    for (parameter, one), other in zip(plain.named_parameters(), kept.parameters(), strict=True):
        assert torch.equal(one, other), parameter


def frozen_linears(model: nn.Module) -> list[nn.Linear]:
    return [each for each in model.modules() if type(each) is nn.Linear and not each.weight.requires_grad]


def test_weights_are_cast_in_the_first_step_alone() -> None:
    model = adapted("lora", "bert").train()
    casts, steps = KeptCasts(model), []
    for _ in range(2):
        with Casts() as counted, casts:
            under_autocast(model, *inputs("bert")).sum().backward()
        steps.append(counted.counts)
    # fc2 and o of three blocks and k of two: a gradient goes through them. LoRA's own layers are q, v and fc1.
    through = [each for each in frozen_linears(model) if each is not model.backbone.encoder.layer[0].attention.self.key]
    assert len(through) == 8 and len(casts.tensors()) == 16
    for layer in through:
        for tensor in (layer.weight, layer.bias):
            assert (steps[0][tensor.data_ptr()], steps[1].get(tensor.data_ptr(), 0)) == (1, 0)
    kept = {tensor.data_ptr(): tensor for tensor in casts.tensors()}
    assert {tensor.dtype for tensor in kept.values()} == {torch.bfloat16}
    assert sum(tensor.numel() for tensor in kept.values()) == sum(
        each.weight.numel() + each.bias.numel() for each in through
    )


@pytest.mark.parametrize("method", ["linear", "unipt"])
def test_nothing_is_kept_where_no_gradient_goes_through(method: str) -> None:
    """Autocast frees such a copy at once; methods beside the backbone save their memory by it."""
    model = adapted(method, "bert").train()
    casts = KeptCasts(model)
    with casts:
        under_autocast(model, *inputs("bert")).sum().backward()
        with torch.no_grad():
            under_autocast(model, *inputs("bert"))
    assert len(frozen_linears(model)) == 18 and not casts.tensors()


def test_without_autocast_the_layers_are_their_own() -> None:
    """In float32 (evaluation, or a part of a model that leaves autocast), also after copies were made."""
    model = adapted("lora", "bert")
    casts, given = KeptCasts(model), inputs("bert")
    expected = model(*given)
    with casts:
        under_autocast(model, *given).sum().backward()
        assert torch.equal(model(*given), expected)
    assert all("forward" not in vars(module) for module in model.modules())
    copy.deepcopy(model)


def test_a_weight_that_changed_is_cast_again() -> None:
    model = adapted("lora", "bert").requires_grad_(False)
    layer = model.backbone.encoder.layer[1].attention.self.key
    x, casts = torch.randn(4, layer.in_features, requires_grad=True), KeptCasts(layer)

    def checked() -> Tensor:
        with casts:
            found = under_autocast(layer, x)
        assert torch.equal(found, under_autocast(layer, x))
        return found

    before = checked()
    layer.load_state_dict({name: 2 * tensor for name, tensor in layer.state_dict().items()})
    written = checked()
    layer.weight = nn.Parameter(3 * layer.weight, requires_grad=False)
    replaced = checked()
    layer.weight.requires_grad_(True)
    checked().sum().backward()
    assert layer.weight.grad is not None and not torch.equal(before, written) and not torch.equal(written, replaced)


def test_a_forward_of_somebody_else_stays() -> None:
    layer = nn.Linear(4, 4).requires_grad_(False)
    layer.forward = theirs = lambda x: x  # type: ignore[method-assign]
    with KeptCasts(layer):
        assert vars(layer)["forward"] is theirs
    assert vars(layer)["forward"] is theirs


class TwoLayers(tiny.Model):
    """With a frozen layer behind the adapted one; notes whether it is lent when the model runs."""

    lent: ClassVar[list[tuple[bool, bool]]] = []

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(8, 8)
        self.head = nn.Sequential(nn.Dropout(0.3), nn.Linear(8, 1))  # no batch norm: it does not go with chunks

    def forward(self, x: Tensor) -> Tensor:
        self.lent.append((self.training, "forward" in vars(self.frozen)))
        return self.head(self.frozen(self.mlp["fc1"](x)))


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_the_trainer_keeps_them_while_it_steps(
    chunk_size: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And gives the layers back before it evaluates; what it trains is the same."""
    monkeypatch.setattr(tiny, "Model", TwoLayers)

    def evaluate(model: nn.Module) -> dict[str, float]:
        return {"rsum": float(model.eval()(tiny.Items()[0][None]).detach())}

    def run(folder: str) -> tuple[nn.Module, set[tuple[bool, bool]]]:
        TwoLayers.lent.clear()
        model = tiny.train(tmp_path / folder, precision="bfloat16", chunk_size=chunk_size, evaluator=evaluate)
        return model, set(TwoLayers.lent)

    kept, while_kept = run("kept")
    monkeypatch.setattr(KeptCasts, "__enter__", lambda self: self)
    plain, while_plain = run("plain")
    assert while_kept == {(True, True), (False, False)} and while_plain == {(True, False), (False, False)}
    for (name, one), other in zip(kept.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.equal(one, other[1]), name

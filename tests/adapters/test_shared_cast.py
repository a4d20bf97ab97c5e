"""Layers that read one input share its copy under autocast, and nothing else does."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor, nn

from adapters import LoRA, inject
from adapters.shared_cast import shared_cast

D = 32


@pytest.fixture
def x() -> Tensor:
    """An activation: what a layer before has made."""
    torch.manual_seed(0)
    return torch.randn(3, 5, D, requires_grad=True) * 2


def test_is_the_cast_of_x_and_shared_while_it_is_kept(x: Tensor) -> None:
    copy = shared_cast(x, torch.bfloat16)
    assert torch.equal(copy, x.bfloat16().view(15, D))
    assert shared_cast(x, torch.bfloat16) is copy
    assert shared_cast(x, torch.float16).dtype == torch.float16
    assert shared_cast(x, torch.float32).data_ptr() == x.data_ptr()


def test_another_input_gets_another_copy(x: Tensor) -> None:
    copy = shared_cast(x, torch.bfloat16)
    other = x + 1
    assert torch.equal(shared_cast(other, torch.bfloat16), other.bfloat16().view(15, D))
    assert shared_cast(x, torch.bfloat16) is not copy  # the last one counts


def test_a_change_in_place_is_seen(x: Tensor) -> None:
    copy = shared_cast(x, torch.bfloat16)
    x.add_(1)
    assert torch.equal(shared_cast(x, torch.bfloat16), x.bfloat16().view(15, D))
    assert not torch.equal(shared_cast(x, torch.bfloat16), copy)


def test_nothing_without_a_gradient_is_shared(x: Tensor) -> None:
    given = torch.randn(4, D, requires_grad=True)
    copy = shared_cast(given, torch.bfloat16)
    with torch.no_grad():
        given.data.zero_()  # no version tells of it
    assert not shared_cast(given, torch.bfloat16).any() and copy.any()
    with torch.no_grad():
        untracked = shared_cast(x, torch.bfloat16)
    assert shared_cast(x, torch.bfloat16).requires_grad and not untracked.requires_grad
    with torch.inference_mode():
        frozen = torch.randn(4, D)
        assert torch.equal(shared_cast(frozen, torch.bfloat16), frozen.bfloat16())


def test_the_copy_lives_no_longer_than_its_graph(x: Tensor) -> None:
    copy = weakref.ref(shared_cast(x, torch.bfloat16))
    assert copy() is None


class Attention(nn.Module):
    """q, k and v of one input, as linear layers of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(D, D) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.norm(x)
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)


def test_q_k_and_v_keep_one_copy_and_their_gradients_add_up() -> None:
    """Against float64, on weights that are bfloat16 numbers."""
    torch.manual_seed(0)
    model = inject(nn.ModuleDict({"self_attn": Attention()}), LoRA(rank=4, targets=("q", "k", "v"))).self_attn
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".B"):
                parameter.normal_()
            parameter.copy_(parameter.bfloat16())
    x = torch.randn(20, D, requires_grad=True)
    kept: list[Tensor] = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16),
    ):
        outputs = model(x)
    inputs = [each for each in kept if each.dtype == torch.bfloat16 and each.shape == x.shape]
    assert len(inputs) == 3 and len({each.data_ptr() for each in inputs}) == 1
    directions = [torch.randn(20, D).bfloat16() for _ in outputs]
    torch.autograd.backward(outputs, directions)

    exact = x.detach().double().requires_grad_()
    normed = torch.nn.functional.layer_norm(exact, (D,))
    for name, direction in zip("qkv", directions, strict=True):
        layer = model.get_submodule(f"{name}_proj")
        branch = layer.branches[name]
        weight = layer.weight.double() + 2 * branch.B.double() @ branch.A.double()  # alpha 8, rank 4
        (normed @ weight.T).backward(direction.double(), retain_graph=True)
    assert (x.grad.double() - exact.grad).norm() / exact.grad.norm() < 0.02  # 2^-8 for each of a few roundings


def test_compiles_into_one_graph() -> None:
    torch.manual_seed(0)
    model = inject(nn.ModuleDict({"self_attn": Attention()}), LoRA(rank=4, targets=("q", "k", "v"))).self_attn
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x = torch.randn(20, D, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for ours, theirs in zip(compiled(x), model(x), strict=True):
            assert torch.equal(ours, theirs)

"""The map with its updates against x (W + BA)^T in float64: outputs, gradients, and what is kept for them."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from adapters.fused_linear import Update, low_rank_linear

N, D_IN, D_OUT, RANK = 20, 32, 48, 4
SLICES = {"whole": [(0, 48)], "q, k, v": [(0, 16), (16, 32), (32, 48)], "q, v": [(0, 16), (32, 48)]}


class Arguments(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor
    factors: list[Tensor]
    """down (r, d_in) and then basis (r, width) of each slice."""

    def leaves(self) -> list[Tensor]:
        return [self.x, self.weight, self.bias, *self.factors]


def arguments(columns: list[tuple[int, int]]) -> Arguments:
    """Numbers that bfloat16 can hold, and everything with a gradient."""
    torch.manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape).bfloat16().float().requires_grad_()

    downs, bases = [leaf(RANK, D_IN) for _ in columns], [leaf(RANK, stop - start) for start, stop in columns]
    return Arguments(leaf(N, D_IN), leaf(D_OUT, D_IN), leaf(D_OUT), downs + bases)


def ours(given: Arguments, columns: list[tuple[int, int]], apart: bool) -> tuple[Tensor, Tensor]:
    """Output and activations (R, N); `apart`: the activations come from outside, as with dropout."""
    downs, bases = given.factors[: len(columns)], given.factors[len(columns) :]
    updates = [Update(down, basis, *where) for down, basis, where in zip(downs, bases, columns, strict=True)]
    if not apart:
        out, activations = low_rank_linear(given.x, given.weight, given.bias, updates)
        assert activations is not None
        return out, activations
    activations = [given.x @ down.T for down in downs]
    out, _ = low_rank_linear(given.x, given.weight, given.bias, updates, activations)
    return out, torch.cat(activations, dim=1).T


def exact(given: Arguments, columns: list[tuple[int, int]]) -> tuple[Tensor, Tensor, Arguments]:
    """The same from the dense updates in float64, on leaves of their own."""
    twin = Arguments(*(each.detach().double().requires_grad_() for each in given[:3]), [])
    twin.factors.extend(each.detach().double().requires_grad_() for each in given.factors)
    downs, bases = twin.factors[: len(columns)], twin.factors[len(columns) :]
    dense = torch.zeros(D_OUT, D_IN, dtype=torch.float64)
    for down, basis, (start, stop) in zip(downs, bases, columns, strict=True):
        dense = torch.cat([dense[:start], dense[start:stop] + basis.T @ down, dense[stop:]])
    return twin.x @ (twin.weight + dense).T + twin.bias, torch.cat(downs) @ twin.x.T, twin


@pytest.mark.parametrize(
    ("apart", "uses"),
    [(False, "output"), (False, "activations"), (False, "both"), (True, "output"), (True, "both")],
)
@pytest.mark.parametrize("slices", SLICES)
def test_outputs_and_gradients(slices: str, apart: bool, uses: str) -> None:
    """A loss reads the output, a penalty the activations: either, or both. Activations from outside are torch's own."""
    columns = SLICES[slices]
    given = arguments(columns)
    out, activations = ours(given, columns, apart)
    expected_out, expected_activations, twin = exact(given, columns)
    to_out, to_activations = torch.randn(N, D_OUT), torch.randn(RANK * len(columns), N)
    pairs = {"output": (out, expected_out, to_out), "activations": (activations, expected_activations, to_activations)}
    losses = [pair for name, pair in pairs.items() if uses in (name, "both")]
    for found, expected, _ in losses:
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    torch.stack([(found * direction).sum() for found, _, direction in losses]).sum().backward()
    torch.stack([(expected * direction.double()).sum() for _, expected, direction in losses]).sum().backward()
    for found, expected in zip(given.leaves(), twin.leaves(), strict=True):
        if found.grad is None:  # the weight, for one, does not reach the activations
            assert expected.grad is None
        else:
            torch.testing.assert_close(found.grad.double(), expected.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("slices", SLICES)
def test_autocast_has_the_gradients_and_keeps_no_copy_of_the_weight(slices: str, apart: bool) -> None:
    columns = SLICES[slices]
    given = arguments(columns)
    given.weight.requires_grad_(False), given.bias.requires_grad_(False)
    kept: list[Tensor] = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16),
    ):
        out, _ = ours(given, columns, apart)
    assert out.dtype == torch.bfloat16
    direction = torch.randn(N, D_OUT).bfloat16()
    out.backward(direction)
    assert kept and not [t for t in kept if t.numel() >= D_OUT * D_IN and t.dtype == torch.bfloat16]

    expected, _, twin = exact(given, columns)
    expected.backward(direction.double())
    found_and_expected = [(out, expected), (given.x.grad, twin.x.grad)]
    found_and_expected += [(f.grad, e.grad) for f, e in zip(given.factors, twin.factors, strict=True)]
    for found, exactly in found_and_expected:
        assert (found.double() - exactly).norm() / exactly.norm() < 0.01  # 2^-8, twice


def test_several_updates_keep_the_input_alone() -> None:
    """Their activations are computed again in the backward pass."""
    columns = SLICES["q, k, v"]
    given = arguments(columns)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        ours(given, columns, apart=False)
    assert kept and {tensor.data_ptr() for tensor in kept} <= {tensor.data_ptr() for tensor in given.leaves()}


def test_another_dtype_without_autocast_is_refused() -> None:
    given = arguments(SLICES["whole"])
    half = given._replace(x=given.x.detach().bfloat16())
    with pytest.raises(TypeError, match=r"the input is torch\.bfloat16, the weight torch\.float32"):
        ours(half, SLICES["whole"], apart=False)

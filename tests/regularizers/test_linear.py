"""The linear measure against Eq. 7 written as the paper prints it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from regularizers import REGULARIZERS, ReSoRA, Subspaces, linear, mean_redundancy, redundancy


def equation_7(activations: Tensor, basis: Tensor) -> Tensor:
    """sum_{i<j} |dH_i dH_j^T|_F^2 / (|dH_i dH_i^T|_F |dH_j dH_j^T|_F) with dH_i (d_out, N) built in full."""
    features = [torch.outer(basis[i], activations[:, i]) for i in range(activations.shape[1])]
    total = activations.new_zeros(())
    for i in range(len(features)):
        for j in range(i + 1, len(features)):
            across = (features[i] @ features[j].T).norm() ** 2
            total = total + across / ((features[i] @ features[i].T).norm() * (features[j] @ features[j].T).norm())
    return total


shapes = st.tuples(st.integers(1, 40), st.integers(1, 9), st.integers(1, 12), st.integers(0, 2**31 - 1))


@settings(deadline=None, max_examples=60)
@given(shapes)
def test_value_and_gradients_are_those_of_equation_7(shape: tuple[int, int, int, int]) -> None:
    samples, rank, width, seed = shape
    generator = torch.Generator().manual_seed(seed)
    activations = torch.randn(samples, rank, generator=generator, dtype=torch.float64, requires_grad=True)
    basis = torch.randn(rank, width, generator=generator, dtype=torch.float64, requires_grad=True)
    ours, theirs = linear(activations, basis), equation_7(activations, basis)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    if rank > 1:
        (gradient,) = torch.autograd.grad(ours, activations)
        expected, of_basis = torch.autograd.grad(theirs, (activations, basis))
        torch.testing.assert_close(gradient, expected, rtol=1e-7, atol=1e-10)
        torch.testing.assert_close(of_basis, torch.zeros_like(of_basis), rtol=0, atol=1e-9)


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from([1e-18, 1e-6, 1.0, 1e15]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 1000),
)
def test_finite_in_value_and_gradient(magnitude: float, dtype: torch.dtype, seed: int) -> None:
    activations = (torch.randn(30, 5, generator=torch.Generator().manual_seed(seed)) * magnitude).to(dtype)
    activations[:, 2] = 0  # a dead subspace
    activations.requires_grad_()
    value = linear(activations, torch.zeros(5, 7))  # B = 0
    value.backward()
    assert torch.isfinite(value) and torch.isfinite(activations.grad).all()
    assert 0 <= value <= 10
    assert not activations.grad[:, 2].any()


def test_limits() -> None:
    assert linear(torch.eye(5), torch.ones(5, 2)) == 0  # orthogonal
    torch.testing.assert_close(
        linear(torch.ones(7, 4), torch.zeros(4, 3)), torch.tensor(6.0)
    )  # identical: r (r - 1) / 2
    assert linear(torch.randn(9, 1), torch.randn(1, 3)) == 0  # no pair


def test_autocast_does_not_round_the_measure() -> None:
    activations = torch.randn(64, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = linear(activations, torch.randn(8, 3))
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, linear(activations, torch.randn(8, 3)), rtol=0, atol=0)


def test_redundancy_squares_to_the_terms_of_equation_7() -> None:
    activations, basis = torch.randn(50, 6), torch.randn(6, 4)
    heat = redundancy(Subspaces(activations, basis))
    torch.testing.assert_close(heat.square().triu(1).sum(), equation_7(activations, basis), rtol=2e-4, atol=0)
    torch.testing.assert_close(heat.diagonal(), torch.ones(6))
    off = heat[~torch.eye(6, dtype=torch.bool)]
    assert mean_redundancy({"a": Subspaces(activations, basis)}) == pytest.approx(float(off.mean()))


def test_resora_weighs_the_mean_over_layers() -> None:
    layers = {f"layer{i}": Subspaces(torch.randn(20, 4), torch.zeros(4, 3)) for i in range(3)}
    expected = 0.25 * sum(linear(*layer) for layer in layers.values()) / 3
    parts = ReSoRA("linear", weight=0.25)(layers)
    assert list(parts) == ["resora_linear"]
    torch.testing.assert_close(parts["resora_linear"], expected)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="did you mean 'linear'"):
        ReSoRA("linaer")
    with pytest.raises(ValueError, match="weight is -1"):
        ReSoRA("linear", weight=-1)
    with pytest.raises(ValueError, match="no subspaces"):
        ReSoRA()({})
    with pytest.raises(ValueError, match="rank 1"):
        mean_redundancy({"a": Subspaces(torch.randn(3, 1), torch.randn(1, 2))})
    assert set(REGULARIZERS) == {"linear"}

"""Every measure against its equation written naively, and where the naive form is 0/0, overflows or has no pair."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import equations
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from regularizers import REGULARIZERS, cosine, euclidean, linear, nonlinear, overlap
from regularizers.eager import at_once
from regularizers.median import median_pair

CLOSED_AND_NAIVE: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "euclidean": (euclidean, equations.equation_5),
    "euclidean, beta": (partial(euclidean, beta=0.3), partial(equations.equation_5, beta=0.3)),
    "cosine": (cosine, equations.equation_6),
    "linear": (linear, equations.equation_7),
    "linear, transposed": (partial(linear, transposed=True), partial(equations.equation_7, transposed=True)),
    "linear, centred": (partial(linear, centered=True), equations.squared_correlation),
    "overlap": (overlap, equations.frobenius_overlap),
}
MEASURES = {
    **REGULARIZERS,
    "linear, centred": partial(linear, centered=True),
    "linear, transposed": partial(linear, transposed=True),
}
shapes = st.tuples(st.integers(1, 40), st.integers(2, 9), st.integers(2, 12), st.integers(0, 2**31 - 1))


def draw(samples: int, rank: int, width: int, seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    activations = torch.randn(samples, rank, generator=generator, dtype=torch.float64)
    basis = torch.randn(rank, width, generator=generator, dtype=torch.float64)
    return activations.to(dtype).requires_grad_(), basis.to(dtype).requires_grad_()


def gradients(value: Tensor, *arguments: Tensor) -> list[Tensor]:
    found = torch.autograd.grad(value, arguments, allow_unused=True)
    return [torch.zeros_like(a) if g is None else g for a, g in zip(arguments, found, strict=True)]


@pytest.mark.parametrize("name", CLOSED_AND_NAIVE)
@settings(deadline=None, max_examples=60)
@given(shape=shapes, dtype=st.sampled_from([torch.float64, torch.float32]))
def test_value_and_gradients_are_those_of_the_equation(
    name: str, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    closed, naive = CLOSED_AND_NAIVE[name]
    assume(name != "linear, centred" or shape[0] > 2)  # two samples are always correlated: 0/0 to the second order
    activations, basis = draw(*shape, dtype=dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in (activations, basis)]
    ours, theirs = closed(activations, basis), naive(*exact)
    relative, rounding = (1e-9, 1e-12) if dtype == torch.float64 else (2e-4, 1e-6)
    torch.testing.assert_close(ours.double(), theirs, rtol=relative, atol=rounding)
    norms = (exact[0].detach().norm(dim=0), exact[1].detach().norm(dim=1))  # of the subspaces' factors
    for mine, expected, norm in zip(gradients(ours, activations, basis), gradients(theirs, *exact), norms, strict=True):
        # of the largest entry, and what rounding leaves where the gradient is zero, as with one sample
        largest, left = float(expected.abs().max()), rounding * (1 + abs(float(theirs.detach() / norm.min())))
        torch.testing.assert_close(mine.double(), expected, rtol=0, atol=relative * largest + left)


@pytest.mark.parametrize("name", MEASURES)
def test_leading_dimensions_are_layers(name: str) -> None:
    layers = [draw(30, 4, 6, seed) for seed in range(3)]
    alone = [MEASURES[name](*layer) for layer in layers]
    stacked = [torch.stack(tensors).detach().requires_grad_() for tensors in zip(*layers, strict=True)]
    together = MEASURES[name](*stacked)
    torch.testing.assert_close(together.detach(), torch.stack(alone).detach())
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    found = gradients((weights * together).sum(), *stacked)
    for index, layer in enumerate(layers):
        for mine, one in zip(found, gradients(weights[index] * alone[index], *layer), strict=True):
            torch.testing.assert_close(mine[index], one)


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 90), st.integers(2, 6), st.sampled_from([0.4, 1.0]), st.integers(0, 2**31 - 1))
def test_nonlinear_is_the_kernel_form(samples: int, rank: int, fraction: float, seed: int) -> None:
    activations, basis = draw(samples, rank, 5, seed)
    ours = nonlinear(activations, basis, sigma_fraction=fraction)
    theirs = equations.equation_8(activations, basis, sigma_fraction=fraction)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    single = nonlinear(activations.detach().float(), basis.detach().float(), sigma_fraction=fraction)
    torch.testing.assert_close(single.double(), theirs.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("samples", [3, 20, 151])
@pytest.mark.parametrize("tails", ["normal", "heavy"])
def test_the_gradient_of_nonlinear_is_that_of_the_kernel_form(samples: int, tails: str) -> None:
    activations, basis = draw(samples, 4, 6, seed=samples)
    if tails == "heavy":  # Cauchy: outliers hundreds of bandwidths away
        activations = (activations.detach() / draw(samples, 4, 6, seed=1)[0].detach()).requires_grad_()
    ours = gradients(nonlinear(activations, basis), activations, basis)
    theirs = gradients(equations.equation_8(activations, basis), activations, basis)
    scale = theirs[0].abs().max()
    torch.testing.assert_close(ours[0] / scale, theirs[0] / scale, rtol=0, atol=2e-4)
    torch.testing.assert_close(ours[1], torch.zeros_like(basis), rtol=0, atol=0)
    torch.testing.assert_close(theirs[1], torch.zeros_like(basis), rtol=0, atol=1e-9)  # the bandwidth takes it away


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 60), st.integers(0, 2**31 - 1), st.booleans())
def test_the_median_distance_is_numpys(samples: int, seed: int, ties: bool) -> None:
    values = np.random.default_rng(seed).normal(size=samples)
    values = np.sort(np.round(values * 2) if ties else values)
    distances = np.sort(np.abs(values[:, None] - values[None, :])[np.triu_indices(samples, 1)])
    ordered = torch.tensor(values)[None]
    lower, upper = median_pair(ordered)
    found = float(ordered[0, upper[0, 0]] - ordered[0, lower[0, 0]])
    assert found == pytest.approx(distances[(len(distances) - 1) // 2], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("kind", ["normal", "heavy", "two lumps", "ties"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_median_distance_of_many(kind: str, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(0)
    values = {
        "normal": rng.normal(size=(2, 3000)), "heavy": rng.standard_cauchy(size=(2, 3000)),
        "two lumps": rng.normal(size=(2, 3000)) + 50 * (rng.random((2, 3000)) < 0.5),
        "ties": np.round(rng.normal(size=(2, 3000)) * 3),
    }[kind]  # fmt: skip
    ordered = torch.tensor(np.sort(values)).to(dtype)
    lower, upper = median_pair(ordered)
    for row, found in zip(ordered.double(), (ordered.gather(1, upper) - ordered.gather(1, lower))[:, 0], strict=True):
        expected = torch.pdist(row[:, None]).median()
        assert float(found) == pytest.approx(float(expected), rel=3e-6 if dtype == torch.float32 else 1e-9)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that is made inside."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        for item in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(item, Tensor):
                self.elements = max(self.elements, item.numel())
        return result


@pytest.mark.parametrize("name", MEASURES)
def test_no_tensor_grows_with_samples_squared_or_with_samples_times_width(name: str) -> None:
    samples, rank, width = 6304, 8, 768
    activations, basis = draw(samples, rank, width, seed=0, dtype=torch.float32)
    with Largest() as largest:
        MEASURES[name](activations, basis).backward()
    assert largest.elements <= samples * rank * 64  # the bumps of nonlinear; N x N is 700 times that
    assert largest.elements < samples * width


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "case", ["basis zero", "dead", "one sample", "one subspace", "constant", "tiny", "huge", "identical", "no sample"]
)
def test_defined_everywhere(name: str, dtype: torch.dtype, case: str) -> None:
    samples, rank, width = {"one sample": 1, "no sample": 0}.get(case, 30), 1 if case == "one subspace" else 5, 7
    activations, basis = (tensor.detach().clone() for tensor in draw(samples, rank, width, 3, torch.float32))
    if case == "basis zero":
        basis.zero_()
    elif case == "dead":
        activations[:, 2] = 0
        basis[3] = 0
    elif case == "constant":
        activations[:] = 0.1
    elif case == "identical":
        activations[:], basis[:] = activations[:, :1].clone(), basis[:1].clone()
    elif case in ("tiny", "huge"):
        magnitude = {"tiny": 1e-18, "huge": 3e4 if dtype == torch.float16 else 1e15}[case]  # 1e-18 is 0 in half
        activations, basis = (tensor.clamp(-2, 2) * magnitude for tensor in (activations, basis))
    activations, basis = activations.to(dtype).requires_grad_(), basis.to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = MEASURES[name](activations, basis)
    assert value.shape == () and value.dtype == torch.float32 and torch.isfinite(value)
    bound = rank * (rank - 1) / 2
    assert -bound - 1e-3 <= float(value.detach()) <= bound + 1e-3
    for gradient in gradients(value, activations, basis) if value.requires_grad else []:
        assert torch.isfinite(gradient).all()


def test_a_loss_scale_protects_the_gradient_of_half_precision() -> None:
    """A gradient of 3e-8 has no digits left in float16; 65536 times as large, as under a GradScaler, it has its own."""
    activations = draw(4096, 8, 8, seed=0, dtype=torch.float16)[0]
    basis = (1e-4 * draw(1, 8, 8, seed=1)[1].detach()).float().requires_grad_()
    exact = [tensor.detach().double().requires_grad_() for tensor in (activations, basis)]
    (expected,) = gradients(equations.equation_5(*exact), exact[0])
    (found,) = gradients(euclidean(activations, basis) * 65536, activations)
    assert found.dtype == torch.float16
    assert (found.double() / 65536 - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("name", ["euclidean", "nonlinear"])
def test_how_much_is_computed_at_once_moves_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [draw(60, 4, 6, seed) for seed in range(4)]
    activations, basis = (torch.stack(tensors).detach().requires_grad_() for tensors in zip(*layers, strict=True))
    found = []
    for size in (100, 700, 1 << 22):  # parts of a layer, some layers, all of them
        monkeypatch.setattr("regularizers.eager.TOGETHER", size)
        monkeypatch.setattr(sys.modules["regularizers.euclidean"], "CHUNK", size)
        value = MEASURES[name](activations, basis)
        found.append([value.detach(), *gradients(value.sum(), activations, basis)])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


def test_an_accelerator_is_given_more_at_once() -> None:
    assert [at_once(100, torch.device(kind)) for kind in ("cpu", "cuda", "mps")] == [100, 800, 800]


MAGNITUDES = (0.0, 1e-30, 1e-18, 1e-6, 1e-3, 1.0, 1e4, 1e15, 1e30)


@pytest.mark.parametrize("name", MEASURES)
@settings(deadline=None, max_examples=60)
@given(data=st.data(), dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))
def test_finite_whatever_the_magnitudes(name: str, dtype: torch.dtype, data: st.DataObject) -> None:
    """Each subspace, and each sample, with a magnitude of its own."""
    samples, rank, width, seed = data.draw(shapes)
    activations, basis = (tensor.detach() for tensor in draw(samples, rank, width, seed, torch.float64))
    limit = float(torch.finfo(dtype).max) / 8

    def scales(count: int) -> Tensor:
        drawn = data.draw(st.lists(st.sampled_from(MAGNITUDES), min_size=count, max_size=count))
        return torch.tensor(drawn, dtype=torch.float64)

    activations, basis = activations * scales(rank), basis * scales(rank)[:, None]
    if data.draw(st.booleans()):
        activations = activations * scales(samples)[:, None]
    activations, basis = (t.clamp(-limit, limit).to(dtype).requires_grad_() for t in (activations, basis))
    value = MEASURES[name](activations, basis)
    assert torch.isfinite(value)
    for gradient in gradients(value, activations, basis) if value.requires_grad else []:
        assert torch.isfinite(gradient).all()


def clustered(samples: int, kind: str, seed: int = 0) -> Tensor:
    """Activations of which more than half of all pairs nearly coincide: (samples, 8) float64."""
    drawn = torch.randn(samples, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if kind == "three quarters alike":
        drawn[: 3 * samples // 4] *= 1e-4
        return drawn
    return torch.nn.functional.gelu(4 * drawn - 8)


@pytest.mark.parametrize("kind", ["three quarters alike", "gelu"])
def test_nonlinear_is_linear_in_the_samples_where_most_of_them_coincide(kind: str) -> None:
    bumps = 8 * 242  # of 128 bandwidths, in each subspace
    for samples in (800, 3200):
        with Largest() as largest:
            nonlinear(clustered(samples, kind).requires_grad_()).backward()
        assert largest.elements <= max(samples, bumps) * bumps
    assert largest.elements < 3200**2


def test_a_bandwidth_is_doubled_where_the_samples_cover_too_many_of_it() -> None:
    """Against the kernel form with the bandwidth that the definition gives, found here with numpy."""
    activations = clustered(700, "three quarters alike")[:, :2].clone().requires_grad_()
    doublings = set()
    for column in activations.detach().numpy().T:
        bandwidth = float(torch.pdist(torch.from_numpy(column.copy())[:, None]).median())
        gaps, times = np.diff(np.sort(column)), 0
        while np.minimum(gaps / bandwidth, 6).sum() > 128:
            bandwidth, times = 2 * bandwidth, times + 1
        doublings.add(times)
    (times,) = doublings
    assert times > 0
    expected = equations.equation_8(activations, torch.ones(2, 3, dtype=torch.float64), sigma_fraction=2.0**times)
    ours = nonlinear(activations)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    (mine,), (theirs,) = gradients(ours, activations), gradients(expected, activations)
    torch.testing.assert_close(mine / theirs.abs().max(), theirs / theirs.abs().max(), rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    ("name", "activations_move", "basis_moves"),
    [("euclidean", True, True), ("cosine", False, True), ("linear", True, False), ("nonlinear", True, False),
     ("overlap", True, True), ("linear, transposed", False, True), ("linear, centred", True, False)],
)  # fmt: skip
def test_which_factor_each_measure_moves(name: str, activations_move: bool, basis_moves: bool) -> None:
    activations, basis = draw(20, 4, 6, seed=0)
    to_activations, to_basis = gradients(MEASURES[name](activations, basis), activations, basis)
    assert (bool(to_activations.any()), bool(to_basis.any())) == (activations_move, basis_moves)


@pytest.mark.parametrize("name", ["linear", "linear, centred", "nonlinear", "overlap", "cosine"])
def test_measures_without_a_scale_do_not_see_one(name: str) -> None:
    activations, basis = draw(40, 5, 6, seed=0)
    scaled = activations * torch.tensor([1e-3, 1.0, 7.0, 1e4, 0.2])
    torch.testing.assert_close(MEASURES[name](scaled, basis * 3), MEASURES[name](activations, basis))


def test_centred_linear_is_the_squared_correlation() -> None:
    activations, basis = draw(50, 4, 3, seed=0)
    shifted = activations.detach() + 5
    correlations = np.corrcoef(shifted.numpy().T)
    assert float(linear(shifted, basis, centered=True)) == pytest.approx((np.triu(correlations, 1) ** 2).sum())


def test_bad_parameters_are_refused() -> None:
    activations, basis = draw(5, 2, 3, seed=0)
    with pytest.raises(ValueError, match="beta is 0"):
        euclidean(activations, basis, beta=0)
    with pytest.raises(ValueError, match="sigma_fraction is -1"):
        nonlinear(activations, basis, sigma_fraction=-1)
    with pytest.raises(ValueError, match="transposed=True"):
        linear(activations, basis, centered=True, transposed=True)


def test_a_second_derivative_is_refused_not_wrong() -> None:
    activations, basis = draw(9, 3, 4, seed=0)
    (first,) = torch.autograd.grad(euclidean(activations, basis), activations, create_graph=True)
    with pytest.raises(RuntimeError, match=r"does not require grad|once_differentiable"):
        first.sum().backward()

"""The penalty over layers, its options, and the diagnostics."""

from __future__ import annotations

import equations
import numpy as np
import pytest
import torch
from torch import Tensor

from regularizers import (
    REGULARIZERS,
    Captured,
    ReSoRA,
    Subspaces,
    dead_components,
    effective_rank,
    linear,
    mean_redundancy,
    redundancy,
)
from regularizers.diagnostics import mean_off_diagonal


def layers() -> dict[str, Subspaces]:
    generator = torch.Generator().manual_seed(0)
    return {
        f"blocks.{i}.{role}": Subspaces(
            torch.randn(20, 4, generator=generator), torch.randn(4, 3, generator=generator)
        )
        for i in range(3) for role in "qv"
    }  # fmt: skip


@pytest.mark.parametrize("measure", REGULARIZERS)
def test_the_penalty_is_the_weighted_mean_or_sum_over_layers(measure: str) -> None:
    values = [REGULARIZERS[measure](*layer) for layer in layers().values()]
    for reduction, expected in (("mean", sum(values) / 6), ("sum", sum(values))):
        parts = ReSoRA(measure, weight=0.25, reduction=reduction)(layers())
        assert list(parts) == [f"resora_{measure}"]
        torch.testing.assert_close(parts[f"resora_{measure}"], 0.25 * expected)


def test_layers_by_pattern() -> None:
    chosen = {name: pair for name, pair in layers().items() if name in ("blocks.1.v", "blocks.2.v")}
    only = ReSoRA("linear", weight=1.0, layers=r"blocks\.[12]\.v")(layers())["resora_linear"]
    torch.testing.assert_close(only, sum(linear(*pair) for pair in chosen.values()) / 2)


def test_parameters_reach_the_measure() -> None:
    def value(**parameters: object) -> Tensor:
        return next(iter(ReSoRA(weight=1.0, **parameters)(layers()).values()))

    expected = sum(equations.equation_5(*pair, beta=0.2) for pair in layers().values()) / 6
    torch.testing.assert_close(value(measure="euclidean", beta=0.2), expected)
    expected = sum(equations.equation_8(*pair, sigma_fraction=0.5) for pair in layers().values()) / 6
    torch.testing.assert_close(value(measure="nonlinear", sigma_fraction=0.5), expected, rtol=1e-5, atol=1e-5)
    expected = sum(equations.equation_7(*pair, transposed=True) for pair in layers().values()) / 6
    torch.testing.assert_close(value(measure="linear", transposed=True), expected, rtol=2e-4, atol=1e-5)


def test_it_prints_what_differs_from_the_defaults() -> None:
    assert repr(ReSoRA("linear", 0.1, centered=True, on="features")) == "ReSoRA('linear', weight=0.1, centered=True)"
    printed = "ReSoRA('euclidean', weight=0.01, layers='q$', beta=2.0)"
    assert repr(eval(printed)) == printed


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="did you mean 'linear'"):
        ReSoRA("linaer")
    with pytest.raises(ValueError, match="weight is -1"):
        ReSoRA("linear", weight=-1)
    with pytest.raises(ValueError, match="no subspaces"):
        ReSoRA()({})
    with pytest.raises(ValueError, match="reduction is 'max'"):
        ReSoRA(reduction="max")
    with pytest.raises(ValueError, match="on is 'outputs'"):
        ReSoRA(on="outputs")
    with pytest.raises(ValueError, match="linear takes no beta; its parameters are centered, transposed"):
        ReSoRA("linear", beta=1.0)
    with pytest.raises(ValueError, match="beta is -1"):
        ReSoRA("euclidean", beta=-1.0)
    with pytest.raises(ValueError, match="no regular expression"):
        ReSoRA(layers="blocks[")
    with pytest.raises(ValueError, match="needs subspaces captured with on='weights'"):
        ReSoRA(on="weights")(Captured("features"))
    with pytest.raises(ValueError, match="rank 1"):
        mean_redundancy({"a": Subspaces(torch.randn(3, 1), torch.randn(1, 2))})


def test_redundancy_squares_to_the_terms_of_equation_7() -> None:
    activations, basis = torch.randn(50, 6), torch.randn(6, 4)
    heat = redundancy(Subspaces(activations, basis))
    expected = equations.equation_7(activations, basis)
    torch.testing.assert_close(heat.square().triu(1).sum(), expected, rtol=2e-4, atol=0)
    torch.testing.assert_close(heat.diagonal(), torch.ones(6))
    off = heat[~torch.eye(6, dtype=torch.bool)]
    assert mean_redundancy({"a": Subspaces(activations, basis)}) == pytest.approx(float(off.mean()))


def test_the_mean_off_the_diagonal() -> None:
    for matrix in ([[1.0, 0.2], [0.4, 1.0]], torch.tensor([[1.0, 0.2], [0.4, 1.0]])):
        assert mean_off_diagonal(matrix) == pytest.approx(0.3)
    with pytest.raises(ValueError, match=r"\(r, r\); received shape \(1, 2\)"):
        mean_off_diagonal([[1.0, 0.2]])
    with pytest.raises(ValueError, match="no pair of subspaces"):
        mean_off_diagonal([[1.0]])


@pytest.mark.parametrize("measure", REGULARIZERS)
def test_layers_of_rank_one_have_no_pair_and_do_not_dilute_the_mean(measure: str) -> None:
    one = Subspaces(torch.randn(20, 1), torch.randn(1, 3))
    four = layers()["blocks.0.q"]
    resora, name = ReSoRA(measure, weight=1.0), f"resora_{measure}"
    torch.testing.assert_close(resora({"a": one, "b": four})[name], REGULARIZERS[measure](*four))
    assert mean_redundancy({"a": one, "b": four}) == mean_redundancy({"b": four})
    with pytest.raises(ValueError, match=r"blocks\.3\.q has rank 1"):
        resora({"blocks.3.q": one})


def test_effective_rank_is_that_of_the_update() -> None:
    for samples, rank, width in ((50, 6, 9), (3, 5, 9), (50, 6, 4)):
        activations, basis = torch.randn(samples, rank), torch.randn(rank, width)
        values = np.linalg.svd((activations @ basis).double().numpy(), compute_uv=False)[: min(samples, rank, width)]
        share = values / values.sum()
        expected = np.exp(-(share * np.log(share)).sum())
        assert effective_rank(Subspaces(activations, basis)) == pytest.approx(expected, rel=1e-4)
    orthogonal = Subspaces(torch.eye(8)[:, :5], torch.eye(5, 7))
    assert effective_rank(orthogonal) == pytest.approx(5)
    assert effective_rank(Subspaces(torch.randn(9, 4), torch.zeros(4, 3))) == 0


def test_dead_components_add_next_to_nothing() -> None:
    activations, basis = torch.randn(40, 5), torch.randn(5, 6)
    assert dead_components(Subspaces(activations, basis)) == 0
    activations[:, 1], basis[3] = 0, basis[3] * 1e-4
    assert dead_components(Subspaces(activations, basis)) == 2
    assert dead_components(Subspaces(activations, torch.zeros(5, 6))) == 5

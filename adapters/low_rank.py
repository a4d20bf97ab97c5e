"""A linear map with low-rank updates on slices of its output, in one pass over the output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Update = tuple[Tensor, Tensor, int, int]
"""activations (N, r), basis (r, stop - start), and the output's columns start, stop that they are added to."""


def low_rank_linear(x: Tensor, weight: Tensor, bias: Tensor | None, updates: Sequence[Update]) -> Tensor:
    """x (N, d_in) -> x weight^T + bias (N, d_out), plus activations @ basis on the columns of each update.

    The products are accumulated into the output by the matrix product itself, and the backward pass reads slices of the
    output's gradient where they are: autograd alone would copy the whole gradient once for each update of a slice.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    factors = [factor.to(x.dtype) for activations, basis, _, _ in updates for factor in (activations, basis)]
    columns = [(start, stop) for _, _, start, stop in updates]
    out: Tensor = _LowRankLinear.apply(x, weight, bias, columns, *factors)
    return out


class _LowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, columns: list[tuple[int, int]], *factors: Tensor
    ) -> Tensor:
        ctx.columns = columns
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight, *factors)
        out = F.linear(x, weight, bias)
        for (start, stop), activations, basis in zip(columns, factors[::2], factors[1::2], strict=True):
            out[:, start:stop].addmm_(activations, basis)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight, *factors = ctx.saved_tensors
        of_x, of_weight, of_bias, _, *of_factors = ctx.needs_input_grad
        results: list[Tensor | None] = []
        for index, (start, stop) in enumerate(ctx.columns):
            activations, basis = factors[2 * index : 2 * index + 2]
            part = gradient[:, start:stop]
            results.append(part @ basis.T if of_factors[2 * index] else None)
            results.append(activations.T @ part if of_factors[2 * index + 1] else None)
        return (
            gradient @ weight if of_x else None,
            gradient.T @ x if of_weight else None,
            gradient.sum(dim=0) if of_bias else None,
            None,
            *results,
        )

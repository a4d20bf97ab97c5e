"""A linear map with low-rank updates on slices of its output, with as few passes over large tensors as there can be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class Update(NamedTuple):
    """x down^T basis, on the output's columns start to stop."""

    down: Tensor
    """(r, d_in), with the scale."""
    basis: Tensor
    """(r, stop - start)."""
    start: int
    stop: int


def low_rank_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, updates: Sequence[Update], activations: Sequence[Tensor] = ()
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """x (N, d_in) -> x weight^T + bias (N, d_out) with the updates on it, and the activations of each update, (N, r).

    One product gives the activations of all updates, and the products with their bases are accumulated into the output
    by the matrix product itself. In the backward pass slices of the output's gradient are read where they are (autograd
    would copy the whole gradient once for each update of a slice), and the gradient of x is accumulated likewise.

    Args:
        x: inputs.
        weight, bias: of the map, (d_out, d_in) and (d_out,).
        updates: or none.
        activations: those of each update, where they are not x down^T (with dropout, say); they are returned.
    """
    if not updates:
        return F.linear(x, weight, bias), ()
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    bases = [update.basis.to(x.dtype) for update in updates]
    columns = [(update.start, update.stop) for update in updates]
    if activations:
        given = [each.to(x.dtype) for each in activations]
        out: Tensor = _Accumulated.apply(x, weight, bias, columns, *given, *bases)
        return out, tuple(activations)
    down = (
        torch.cat([update.down.to(x.dtype) for update in updates]) if len(updates) > 1 else updates[0].down.to(x.dtype)
    )
    out, together = _LowRankLinear.apply(x, weight, bias, down, columns, *bases)
    return out, together.split([len(basis) for basis in bases], dim=1)


def _add(out: Tensor, columns: list[tuple[int, int]], activations: Sequence[Tensor], bases: Sequence[Tensor]) -> Tensor:
    for (start, stop), each, basis in zip(columns, activations, bases, strict=True):
        out[:, start:stop].addmm_(each, basis)
    return out


class _LowRankLinear(torch.autograd.Function):
    """x, weight, bias, down (R, d_in) of all updates, their bases -> output, activations (N, R) of all updates."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        columns: list[tuple[int, int]],
        *bases: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.columns = columns
        ctx.set_materialize_grads(False)
        activations = x @ down.T
        ctx.save_for_backward(x, weight, down, activations, *bases)
        ranks = [len(basis) for basis in bases]
        return _add(F.linear(x, weight, bias), columns, activations.split(ranks, dim=1), bases), activations

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor | None, more: Tensor | None) -> Any:
        """`gradient` is of the output, `more` of the activations (what a penalty sends); either may be None."""
        x, weight, down, activations, *bases = ctx.saved_tensors
        of_x, of_weight, of_bias, of_down, _, *of_bases = ctx.needs_input_grad
        to_x = to_weight = to_bias = None
        to_bases: list[Tensor | None] = [None] * len(bases)
        if gradient is None:
            assert more is not None
            to_activations = more
        else:
            parts = [gradient[:, start:stop] for start, stop in ctx.columns]
            to_activations = torch.cat([part @ basis.T for part, basis in zip(parts, bases, strict=True)], dim=1)
            if more is not None:
                to_activations += more
            each = activations.split([len(basis) for basis in bases], dim=1)
            to_bases = [a.T @ part if needed else None for a, part, needed in zip(each, parts, of_bases, strict=True)]
            to_x = gradient @ weight if of_x else None
            to_weight = gradient.T @ x if of_weight else None
            to_bias = gradient.sum(dim=0) if of_bias else None
        if of_x:
            to_x = to_activations @ down if to_x is None else to_x.addmm_(to_activations, down)
        return to_x, to_weight, to_bias, to_activations.T @ x if of_down else None, None, *to_bases


class _Accumulated(torch.autograd.Function):
    """The same with activations that are given: x, weight, bias, activations (N, r) and bases of each update."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, columns: list[tuple[int, int]], *factors: Tensor
    ) -> Tensor:
        ctx.columns = columns
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight, *factors)
        return _add(F.linear(x, weight, bias), columns, factors[: len(columns)], factors[len(columns) :])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight, *factors = ctx.saved_tensors
        activations, bases = factors[: len(ctx.columns)], factors[len(ctx.columns) :]
        of_x, of_weight, of_bias, *_ = ctx.needs_input_grad
        parts = [gradient[:, start:stop] for start, stop in ctx.columns]
        return (
            gradient @ weight if of_x else None,
            gradient.T @ x if of_weight else None,
            gradient.sum(dim=0) if of_bias else None,
            None,
            *(part @ basis.T for part, basis in zip(parts, bases, strict=True)),
            *(each.T @ part for part, each in zip(parts, activations, strict=True)),
        )

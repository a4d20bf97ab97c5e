"""A linear map with low-rank updates on slices of its output, with as few passes over large tensors as there can be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from adapters.shared_cast import shared_cast


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
) -> tuple[Tensor, Tensor | None]:
    """x (..., d_in) -> x weight^T + bias (N, d_out) with the updates on it, and the activations of all, (R, N).

    One product gives the activations of all updates, and the products with their bases are accumulated into the output
    by the matrix product itself. In the backward pass slices of the output's gradient are read where they are (autograd
    would copy the whole gradient once for each update of a slice), and the gradient of x is accumulated likewise. Under
    autocast the weight is cast for each product, in the backward pass anew: kept copies would be 6 % of the memory of
    a step of ViT-B with 4 images and q, k and v adapted; layers that read one x share its copy (`shared_cast`). The
    activations of several updates are computed anew in the backward pass: 0.1 % more FLOPs and 0.2 % less memory in a
    step of ViT-B with 32 images.

    Args:
        x: inputs; N of them.
        weight, bias: of the map, (d_out, d_in) and (d_out,).
        updates: or none.
        activations: those of each update, (N, r), where they are not x down^T (with dropout, say); then none are
            returned.

    Raises:
        TypeError: without autocast, if x and weight differ in dtype.
    """
    if not updates:
        return F.linear(x.reshape(-1, x.shape[-1]), weight, bias), None
    if torch.is_autocast_enabled(x.device.type):
        x = shared_cast(x, torch.get_autocast_dtype(x.device.type))
    elif x.dtype == weight.dtype:
        x = x.reshape(-1, x.shape[-1])
    else:
        raise TypeError(f"the input is {x.dtype}, the weight {weight.dtype}: expected the same, or autocast")
    bases = [update.basis.to(x.dtype) for update in updates]
    columns = [(update.start, update.stop) for update in updates]
    if activations:
        given = [each.to(x.dtype) for each in activations]
        out: Tensor = _Accumulated.apply(x, weight, bias, columns, *given, *bases)
        return out, None
    downs = [update.down.to(x.dtype) for update in updates]
    return _LowRankLinear.apply(x, weight, bias, columns, *downs, *bases)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The map alone, in the dtype of x. Autocast must not cast here: it would keep a copy that has no gradient."""
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _add(out: Tensor, columns: list[tuple[int, int]], activations: Sequence[Tensor], bases: Sequence[Tensor]) -> Tensor:
    for (start, stop), each, basis in zip(columns, activations, bases, strict=True):
        out[:, start:stop].addmm_(each.contiguous(), basis)  # in bfloat16 a transposed one can take 1.7 times as long
    return out


class _LowRankLinear(torch.autograd.Function):
    """x, weight, bias, down and then basis of each update -> output, activations (R, N) of all updates.

    Activations and their gradients lie one subspace after another: those of an update are one piece of memory, and the
    products that read the large gradient are the faster ones. The other small factors are copied into the order that
    the library is fastest with.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, columns: list[tuple[int, int]], *factors: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.columns, ctx.ranks = columns, [len(down) for down in factors[: len(columns)]]
        ctx.set_materialize_grads(False)
        activations = _stacked(factors[: len(columns)]) @ x.T
        kept = None if len(columns) > 1 else activations
        ctx.save_for_backward(x, weight, kept, *factors)  # not the stacked copy: factors are parameters
        each = [part.T for part in activations.split(ctx.ranks)]
        return _add(_linear(x, weight, bias), columns, each, factors[len(columns) :]), activations

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor | None, more: Tensor | None) -> Any:
        """`gradient` is of the output, `more` of the activations (what a penalty sends); either may be None."""
        x, weight, activations, *factors = ctx.saved_tensors
        downs, bases = factors[: len(ctx.columns)], factors[len(ctx.columns) :]
        down = _stacked(downs)
        of_x, of_weight, of_bias, _, *of_factors = ctx.needs_input_grad
        of_downs, of_bases = of_factors[: len(downs)], of_factors[len(downs) :]
        to_x = to_weight = to_bias = None
        to_downs: Sequence[Tensor | None] = [None] * len(downs)
        to_bases: list[Tensor | None] = [None] * len(bases)
        if gradient is None:
            assert more is not None
            to_activations = more
        else:
            activations = down @ x.T if activations is None else activations
            to_activations = torch.empty_like(activations)
            pieces = zip(ctx.columns, activations.split(ctx.ranks), to_activations.split(ctx.ranks), strict=True)
            for index, ((start, stop), each, to_each) in enumerate(pieces):
                part = gradient[:, start:stop]  # read twice, while it is near
                torch.mm(bases[index].contiguous(), part.T, out=to_each)
                to_bases[index] = each @ part if of_bases[index] else None
            if more is not None:
                to_activations += more
            to_weight = gradient.T @ x if of_weight else None
            to_bias = gradient.sum(dim=0) if of_bias else None
        if of_x:
            if gradient is None:
                to_x = to_activations.T @ down
            else:
                to_x = (gradient @ weight.to(x.dtype)).addmm_(to_activations.T.contiguous(), down)
        if any(of_downs):
            to_downs = (to_activations @ x).split(ctx.ranks)
        return to_x, to_weight, to_bias, None, *to_downs, *to_bases


def _stacked(downs: Sequence[Tensor]) -> Tensor:
    """(R, d_in) of all updates, without a copy where there is one."""
    return torch.cat(list(downs)) if len(downs) > 1 else downs[0]


class _Accumulated(torch.autograd.Function):
    """The same with activations that are given: x, weight, bias, activations (N, r) and bases of each update."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, columns: list[tuple[int, int]], *factors: Tensor
    ) -> Tensor:
        ctx.columns = columns
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight, *factors)
        return _add(_linear(x, weight, bias), columns, factors[: len(columns)], factors[len(columns) :])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight, *factors = ctx.saved_tensors
        activations, bases = factors[: len(ctx.columns)], factors[len(ctx.columns) :]
        of_x, of_weight, of_bias, *_ = ctx.needs_input_grad
        parts = [gradient[:, start:stop] for start, stop in ctx.columns]
        return (
            gradient @ weight.to(gradient.dtype) if of_x else None,
            gradient.T @ x if of_weight else None,
            gradient.sum(dim=0) if of_bias else None,
            None,
            *(part @ basis.T for part, basis in zip(parts, bases, strict=True)),
            *(each.T @ part for part, each in zip(parts, activations, strict=True)),
        )

"""Scalars that bring their gradient along, so that nothing large waits for the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def eager_gradient(function: Callable[[Tensor, Tensor], Tensor], activations: Tensor, basis: Tensor) -> Tensor:
    """``function(activations, basis)``, a scalar, with its gradient computed at once.

    A measure runs in every adapted layer. Its intermediate tensors, many times larger than (N, r), would all be kept
    until the backward pass; the gradients of a scalar have the size of its arguments.
    """
    if torch.is_grad_enabled() and (activations.requires_grad or basis.requires_grad):
        value: Tensor = _Eager.apply(function, activations, basis)
        return value
    return function(activations, basis)


class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[[Tensor, Tensor], Tensor], *tensors: Tensor) -> Tensor:
        needed = ctx.needs_input_grad[1:]
        leaves = [tensor.detach().requires_grad_(need) for tensor, need in zip(tensors, needed, strict=True)]
        with torch.enable_grad():
            value = function(*leaves)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        found = torch.autograd.grad(value, wanted, allow_unused=True) if value.requires_grad else [None] * len(wanted)
        gradients = iter(found)
        ctx.save_for_backward(*(next(gradients) if need else None for need in needed))
        return value.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        saved = ctx.saved_tensors
        return None, *(None if one is None else (gradient * one).to(one.dtype) for one in saved)

"""Measures that bring their gradient along, so that nothing large waits for the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

ValueAndGradients = tuple[Tensor, Tensor | None, Tensor | None]
"""A scalar for each of L layers (L,), its gradients to activations (L, N, r) and basis (L, r, d_out); None for zero."""

TOGETHER = 1 << 20  # activations of the layers that are handed over at once: a bound on the memory of their copies
LARGER = 8  # times as many elements at once on an accelerator: no cache to stay in, but each operation is launched


def at_once(elements: int, device: torch.device) -> int:
    """How many elements to take at a time where it is `elements` on a CPU."""
    return elements if device.type == "cpu" else LARGER * elements


def with_gradients(
    function: Callable[[Tensor, Tensor], ValueAndGradients], activations: Tensor, basis: Tensor
) -> Tensor:
    """A measure of each layer from a function of several layers that also gives the gradients.

    A measure runs in every adapted layer. Its intermediate tensors, many times larger than (N, r), would all be kept
    until the backward pass; the gradients of a scalar have the size of its arguments.

    Args:
        function: (L, N, r), (L, r, d_out) -> values and gradients; runs without autograd and autocast.
        activations: ``(..., N, r)``.
        basis: ``(..., r, d_out)``.

    Returns:
        Tensor: ``(...)``.
    """
    layers = activations.shape[:-2]
    flat = (tensor.flatten(0, -3) if layers else tensor[None] for tensor in (activations, basis))
    values: Tensor = _WithGradients.apply(function, *flat)
    return values.reshape(layers)


class _WithGradients(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, function: Callable[[Tensor, Tensor], ValueAndGradients], activations: Tensor, basis: Tensor
    ) -> Tensor:
        with torch.autocast(activations.device.type, enabled=False):
            layers = max(1, at_once(TOGETHER, activations.device) // max(1, activations[0].numel()))
            groups = zip(activations.split(layers), basis.split(layers), strict=True)
            values, *gradients = zip(*(function(*group) for group in groups), strict=True)
            saved = [
                torch.cat(found) if needed and found[0] is not None else None
                for needed, found in zip(ctx.needs_input_grad[1:], gradients, strict=True)
            ]
            ctx.dtypes = activations.dtype, basis.dtype
            ctx.save_for_backward(*saved)
            return torch.cat(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        factor = gradient[:, None, None]
        return None, *(
            None if saved is None else (factor * saved).to(dtype)
            for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )


def kept(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """A gradient as it waits for the backward pass: in its argument's type `dtype`, in whose range it is cut to lie.

    That of a float16 argument waits in float32: it may be smaller than float16 has a place for, and the loss scale that
    makes it larger comes in the backward pass.
    """
    largest = torch.finfo(dtype).max
    return gradient.clamp(-largest, largest).to(torch.float32 if dtype == torch.float16 else dtype)

"""Casts of frozen weights that are kept from step to step.

Autocast keeps the bfloat16 copy of a weight that trains until its context ends, and makes that of a frozen one anew for
each product: beside an adapter nearly all weights are frozen. The copies of layers that a gradient goes through live
until the backward pass anyway, so that keeping these adds little to the peak: 0.2 % of a step of ViT-B/16 with LoRA and
4 images, for the first block's layers.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class KeptCasts(AbstractContextManager["KeptCasts"]):
    """While it is open, the frozen `nn.Linear` layers of a model do not cast their weight a second time.

        casts = KeptCasts(model)
        for batch in batches:
            with casts, torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(**batch).loss
            loss.backward()

    The numbers are the same to the last bit. A copy is kept where autocast is on and a gradient goes through the layer:
    elsewhere autocast frees it at once, and keeping it would take memory. It is made anew where the weight was replaced
    or written to, but what is written through `weight.data` is not seen. The copies go with this object.

    Under gradient checkpointing, where autocast's copies live for one block, these take the memory of all blocks.

    Args:
        model: any, of PEFT too. What is frozen is looked up once, here.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = [
            _Layer(module)
            for module in model.modules()
            if type(module) is nn.Linear and not module.weight.requires_grad
        ]

    def __enter__(self) -> KeptCasts:
        for layer in self._layers:
            layer.lend()
        return self

    def __exit__(self, *error: object) -> None:
        for layer in self._layers:
            layer.take_back()

    def tensors(self) -> list[Tensor]:
        """What is kept."""
        return [
            tensor
            for layer in self._layers
            for tensor in layer.casts
            if tensor is not None and not tensor.requires_grad
        ]


class _Layer:
    """A frozen linear layer, and the copies of its weight and bias."""

    def __init__(self, linear: nn.Linear) -> None:
        self.linear = linear
        self.casts: tuple[Tensor | None, ...] = ()
        self.of: tuple[Any, ...] = ()

    def lend(self) -> None:
        """Have the layer compute with the copies, unless somebody (accelerate, say) gave it a forward of its own."""
        vars(self.linear).setdefault("forward", self)

    def take_back(self) -> None:
        if vars(self.linear).get("forward") is self:
            del self.linear.forward

    def __call__(self, x: Tensor) -> Tensor:
        """The forward pass of the layer."""
        linear, device = self.linear, x.device.type
        if linear.weight.requires_grad or not torch.is_autocast_enabled(device):
            return F.linear(x, linear.weight, linear.bias)
        dtype = torch.get_autocast_dtype(device)
        of = (dtype, *((p.data_ptr(), p._version) for p in linear.parameters() if not p.requires_grad))
        if of != self.of:
            if not (x.requires_grad and torch.is_grad_enabled()):
                return F.linear(x, linear.weight, linear.bias)
            self.of, self.casts = of, (_cast(linear.weight, dtype), _cast(linear.bias, dtype))
        return F.linear(x, *self.casts)  # type: ignore[arg-type]


def _cast(parameter: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A copy of what is frozen; what trains (a bias, in BitFit) as it is."""
    return parameter if parameter is None or parameter.requires_grad else parameter.detach().to(dtype)

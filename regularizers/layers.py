"""What can be captured: the low-rank layers of this suite and those of Hugging Face PEFT, behind one protocol."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

Record = Callable[[str, Tensor, Tensor, torch.Size], None]
"""Called with role, activations (N, r), basis (r, d_out) and the leading shape of the layer's input."""


class LowRankLayer(Protocol):
    """A layer with one or several low-rank updates, each under a role."""

    @property
    def roles(self) -> tuple[str, ...]: ...

    def weight_subspaces(self, role: str) -> tuple[Tensor, Tensor]:
        """activations (d_in, r) and basis (r, d_out) of the update's weight, with their graph."""
        ...

    def listen(self, record: Record) -> Any:
        """A context in which each forward pass calls `record` for each update that it applies."""
        ...


def low_rank_layers(model: nn.Module) -> dict[str, LowRankLayer]:
    """The layers of `model` that have rank-1 subspaces, by name.

    A module takes part if it has an attribute `record` (with `roles` and `weight_subspaces`), as the layers of
    `adapters` do, or if it is a LoRA layer of PEFT.
    """
    layers: dict[str, LowRankLayer] = {}
    for name, module in model.named_modules():
        if hasattr(module, "record"):
            layers[name] = OwnLayer(name, module)
        elif all(hasattr(module, attribute) for attribute in ("lora_A", "lora_B", "scaling", "active_adapters")):
            layers[name] = PeftLayer(name, module)
    return layers


class OwnLayer:
    """A layer that calls its attribute `record`, while that is set."""

    def __init__(self, name: str, module: Any) -> None:
        self.name, self.module = name, module

    @property
    def roles(self) -> tuple[str, ...]:
        roles: tuple[str, ...] = self.module.roles
        return roles

    def weight_subspaces(self, role: str) -> tuple[Tensor, Tensor]:
        pair: tuple[Tensor, Tensor] = self.module.weight_subspaces(role)
        return pair

    @contextmanager
    def listen(self, record: Record) -> Iterator[None]:
        if self.module.record is not None:
            raise RuntimeError(f"{self.name} is being captured already: leave the outer capture(model) first")
        self.module.record = record
        try:
            yield
        finally:
            self.module.record = None


class PeftLayer:
    """A `peft.tuners.lora.LoraLayer`: each of its active adapters is a role.

    Its forward adds ``lora_B(lora_A(dropout(x))) * scaling``; the output of `lora_A` is taken as it is computed.
    """

    def __init__(self, name: str, module: Any) -> None:
        self.name, self.module = name, module

    @property
    def roles(self) -> tuple[str, ...]:
        """The adapters that are switched on.

        Raises:
            ValueError: for an adapter whose update is not a sum of the rank-1 parts of `lora_A` and `lora_B`.
        """
        module = self.module
        if module.disable_adapters or module.merged:
            return ()
        active = [adapter for adapter in module.active_adapters if adapter in module.r]
        for adapter in active:
            if adapter in module.lora_variant:
                kind = type(module.lora_variant[adapter]).__name__
                raise self._cannot(f"adapter {adapter!r} is a LoRA variant ({kind}), whose update has another form")
            if adapter not in module.lora_A or not isinstance(module.lora_A[adapter], nn.Linear):
                raise self._cannot(f"it adapts {type(module.get_base_layer()).__name__}, not a linear layer")
        return tuple(active)

    def _cannot(self, why: str) -> ValueError:
        return ValueError(f"cannot capture {self.name}: {why}; leave it out with capture(model, layers=PATTERN)")

    def weight_subspaces(self, role: str) -> tuple[Tensor, Tensor]:
        return self.module.lora_A[role].weight.T * self.module.scaling[role], self.module.lora_B[role].weight.T

    @contextmanager
    def listen(self, record: Record) -> Iterator[None]:
        def hook(role: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
            def forward(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
                activations = output.flatten(0, -2) * self.module.scaling[role]
                record(role, activations, self.module.lora_B[role].weight.T, output.shape[:-1])

            return forward

        handles = [self.module.lora_A[role].register_forward_hook(hook(role)) for role in self.roles]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

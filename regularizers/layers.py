"""What can be captured: the low-rank layers of this suite and those of Hugging Face PEFT, behind one protocol."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.module_tracker import ModuleTracker

AUTOGRAD = ModuleTracker()  # only asked whether a backward pass is running, `is_bw`; it tracks nothing unless entered


class Record(Protocol):
    """What a layer calls in its forward pass.

    It keeps its arguments and computes nothing: under gradient checkpointing, an operation that the second forward pass
    does not repeat would be an error.
    """

    def __call__(self, role: str, activations: Tensor, basis: Tensor, shape: torch.Size, scale: float = 1.0) -> None:
        """activations (..., r) without `scale`, basis (r, d_out), and the leading shape of the layer's input."""
        ...


class LowRankLayer(Protocol):
    """A layer with one or several low-rank updates, each under a role."""

    @property
    def roles(self) -> tuple[str, ...]: ...

    def weight_subspaces(self, role: str) -> tuple[Tensor, Tensor]:
        """activations (d_in, r) and basis (r, d_out) of the update's weight, with their graph."""
        ...

    def listen(self, record: Record, roles: Collection[str]) -> AbstractContextManager[None]:
        """A context in which each forward pass calls `record` for each of `roles` that it applies."""
        ...

    def replay(self, role: str, activations: Tensor) -> None:
        """When a forward pass in the backward pass has computed these activations again, add their gradient to it."""
        ...


class Replay:
    """Reentrant gradient checkpointing runs a layer without a graph, and again, with one, in the backward pass.

    A penalty on the activations of the first pass leaves its gradient on them, which are leaves; in the second pass it
    is added to the gradient of the same activations. Autograd runs what was computed last first, so that the penalty's
    gradient is there by then. A pass under no_grad of the user's own has no second one: what waits for it must not take
    the forward pass of a later step for that.
    """

    def __init__(self, activations: Tensor) -> None:
        self.first = weakref.ref(activations)  # nothing is held for a backward pass that never comes

    @staticmethod
    def now() -> bool:
        """Whether this forward pass may be the second one."""
        return torch.is_grad_enabled() and bool(AUTOGRAD.is_bw)

    def __call__(self, activations: Tensor) -> None:
        if (first := self.first()) is not None and activations.requires_grad:
            activations.register_hook(
                lambda gradient: gradient if first.grad is None else gradient + first.grad.view_as(gradient)
            )


def low_rank_layers(model: nn.Module) -> dict[str, LowRankLayer]:
    """The layers of `model` that have rank-1 subspaces, by name.

    A module takes part if it has an attribute `record`, and its class `roles` and `weight_subspaces`, as the layers of
    `adapters` do, or if it is a LoRA layer of PEFT.
    """
    layers: dict[str, LowRankLayer] = {}
    for name, module in model.named_modules():
        attributes = vars(module)  # hasattr on each module of a model would take a millisecond of every step
        if "record" in attributes and hasattr(type(module), "weight_subspaces"):
            layers[name] = OwnLayer(name, module)
        elif "scaling" in attributes and all(
            hasattr(module, of_lora) for of_lora in ("lora_A", "lora_B", "lora_variant")
        ):
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
    def listen(self, record: Record, roles: Collection[str]) -> Iterator[None]:
        if self.module.record is not None and not hasattr(self.module.record, "replays"):
            raise RuntimeError(f"{self.name} is being captured already: leave the outer capture(model) first")

        def keep(role: str, activations: Tensor, basis: Tensor, shape: torch.Size) -> None:
            if role in roles:
                record(role, activations, basis, shape)

        self.module.record = keep
        try:
            yield
        finally:
            self.module.record = None

    def replay(self, role: str, activations: Tensor) -> None:
        if self.module.record is None:
            replays: dict[str, Replay] = {}

            def again(role: str, activations: Tensor, basis: Tensor, shape: torch.Size) -> None:
                for gone in [other for other, replay in replays.items() if replay.first() is None]:
                    del replays[gone]
                if role in replays and Replay.now():
                    replays.pop(role)(activations)
                if not replays:
                    self.module.record = None

            again.replays = replays  # type: ignore[attr-defined]
            self.module.record = again
        self.module.record.replays[role] = Replay(activations)


class PeftLayer:
    """A `peft.tuners.lora.LoraLayer`: each of its active adapters is a role.

    Its forward adds ``lora_B(lora_A(dropout(x))) * scaling``; the output of `lora_A` is taken as it is computed.
    """

    def __init__(self, name: str, module: Any) -> None:
        self.name, self.module = name, module

    @property
    def roles(self) -> tuple[str, ...]:
        """The active adapters that this layer has."""
        return tuple(adapter for adapter in self.module.active_adapters if adapter in self.module.r)

    def weight_subspaces(self, role: str) -> tuple[Tensor, Tensor]:
        self._check(role)
        return self.module.lora_A[role].weight.T * self.module.scaling[role], self.module.lora_B[role].weight.T

    def _check(self, role: str) -> None:
        """Raise ValueError for an adapter whose update is not a sum of the rank-1 parts of `lora_A` and `lora_B`."""
        module, why = self.module, ""
        base = module.get_base_layer()
        if role in module.lora_variant:
            why = f"adapter {role!r} is a LoRA variant ({type(module.lora_variant[role]).__name__})"
        elif role not in module.lora_A or isinstance(base, nn.MultiheadAttention) or hasattr(module, "parameter_name"):
            why = f"it adapts {type(base).__name__} in a way that never calls lora_A"
        elif not isinstance(module.lora_A[role], nn.Linear):
            why = f"its factors are {type(module.lora_A[role]).__name__}, not linear layers"
        elif module.lora_B[role].bias is not None:
            why = f"adapter {role!r} has lora_bias=True, and a bias is part of no subspace"
        if why:
            raise ValueError(f"cannot capture {self.name}: {why}; leave it out with capture(model, layers=PATTERN)")

    @contextmanager
    def listen(self, record: Record, roles: Collection[str]) -> Iterator[None]:
        def hook(role: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
            def forward(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
                record(role, output, self.module.lora_B[role].weight.T, output.shape[:-1], self.module.scaling[role])

            return forward

        for role in roles:
            self._check(role)
        handles = [self.module.lora_A[role].register_forward_hook(hook(role)) for role in roles]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def replay(self, role: str, activations: Tensor) -> None:
        replay = Replay(activations)

        def again(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if Replay.now() or replay.first() is None:  # gone: the backward pass never came
                handle.remove()
                replay(output)

        handle = self.module.lora_A[role].register_forward_hook(again)

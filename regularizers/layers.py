"""What can be captured: the low-rank layers of this suite and those of Hugging Face PEFT, behind one protocol."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from regularizers.reentrant import Replay


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
        if isinstance(self.module.record, _Replays):
            if self.module.record.waiting():
                _refuse_before_backward(self.name)
        elif self.module.record is not None:
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
            self.module.record = _Replays(self.module)
        self.module.record.replays[role] = Replay(activations)


class _Replays:
    """The `record` of a layer of this suite between the passes of a reentrant checkpoint.

    Attributes:
        replays: by role. The layer computes its activations in sight of autograd where its record has this attribute.
    """

    def __init__(self, module: Any) -> None:
        self.module, self.replays = module, dict[str, Replay]()

    def waiting(self) -> bool:
        """Whether the second pass of one of them may still come."""
        self.replays = {role: replay for role, replay in self.replays.items() if not replay.gone}
        return bool(self.replays)

    def __call__(self, role: str, activations: Tensor, basis: Tensor, shape: torch.Size) -> None:
        if self.waiting() and role in self.replays and Replay.now():
            self.replays.pop(role).add_to(activations)
        if not self.replays:
            self.module.record = None


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
            hooks = self.module.lora_A[role]._forward_hooks.values()
            if any(isinstance(waits, _ReplayHook) and not waits.replay.gone for waits in hooks):
                _refuse_before_backward(self.name)
        handles = [self.module.lora_A[role].register_forward_hook(hook(role)) for role in roles]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def replay(self, role: str, activations: Tensor) -> None:
        hook = _ReplayHook(Replay(activations))
        hook.handle = self.module.lora_A[role].register_forward_hook(hook)


class _ReplayHook:
    """A hook on a `lora_A` between the passes of a reentrant checkpoint."""

    handle: RemovableHandle

    def __init__(self, replay: Replay) -> None:
        self.replay = replay

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if Replay.now() or self.replay.gone:
            self.handle.remove()
            self.replay.add_to(output)


def _refuse_before_backward(name: str) -> NoReturn:
    raise RuntimeError(
        f"{name} was captured under reentrant gradient checkpointing, and the backward pass of that penalty has not "
        "come yet: call backward, or drop the loss, before the next capture(model); or use the other mode, "
        "gradient_checkpointing_kwargs={'use_reentrant': False}"
    )

"""Put an adapter into a model, count what trains, and fold it back into the weights."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from adapters.base import AdaptedLinear, Adapter


@dataclass(frozen=True)
class Injection:
    """What `inject` did to a model; kept on it as `model.injection`."""

    adapter: Adapter
    train: tuple[str, ...]


def inject(model: nn.Module, adapter: Adapter, train: Iterable[str] = ()) -> nn.Module:
    """Freeze `model`, put `adapter` into it, and let the submodules or parameters named in `train` train too. In place.

    Args:
        model: any module that holds known architectures (see `adapters.targets`), at any depth.
        adapter: one of `ADAPTERS`, configured.
        train: paths of submodules or parameters that train besides the adapter, such as `("head",)`.

    Returns:
        The same model.

    Raises:
        ValueError: if the model already holds an adapter, a target is nowhere in it, or a name in `train` is unknown.
    """
    train = (train,) if isinstance(train, str) else tuple(train)
    if (held := injection(model)) is not None:
        raise ValueError(f"{type(model).__name__} already holds {held.adapter}; inject into a fresh model")
    before = [name for name, _ in model.named_modules() if name] + [name for name, _ in model.named_parameters()]
    if unknown := [name for name in train if name not in before]:
        close = difflib.get_close_matches(unknown[0], before, n=3) or [n for n, _ in model.named_children()]
        raise ValueError(
            f"train={unknown[0]!r} names nothing in {type(model).__name__}; did you mean {', '.join(close)}?"
        )

    model.requires_grad_(False)
    adapter.apply(model)
    for name, parameter in model.named_parameters():
        if any(name == prefix or name.startswith(prefix + ".") for prefix in train):
            parameter.requires_grad_(True)
    object.__setattr__(model, "injection", Injection(adapter, train))
    return model


def injection(model: nn.Module) -> Injection | None:
    """What was injected into `model`, or None."""
    return getattr(model, "injection", None)


def merge(model: nn.Module) -> nn.Module:
    """Fold the adapter into the weights: the backbone's own classes and state-dict keys, the same outputs. In place.

    Branches are added to the weights in float32. What trained besides the adapter (`train`) keeps its values.

    Raises:
        ValueError: if the model holds no adapter.
    """
    if injection(model) is None:
        raise ValueError(f"{type(model).__name__} holds no adapter: nothing to merge")
    for module in list(model.modules()):
        if isinstance(module, AdaptedLinear):
            module.merge()
    del model.injection
    return model


def trainable_parameters(model: nn.Module) -> int:
    """The number of parameters that train; a parameter that is shared counts once."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def adapter_parameters(model: nn.Module) -> set[str]:
    """The names of the parameters that the adapter itself brought into the model (not what `train` named)."""
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, AdaptedLinear)]
    return {f"{name}.branches.{key}" for name, layer in layers for key, _ in layer.branches.named_parameters()}

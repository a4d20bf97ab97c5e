"""Fold an adapter back into the weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from adapters.encoder_layer import return_to_fast_path
from adapters.extend import Extension
from adapters.inject import Injection, injection, uncompiled


def merge(model: nn.Module) -> nn.Module:
    """Fold the adapter into the weights: the backbone's own classes and state-dict keys, the same outputs. In place.

    Updates are added to the weights in float32 at least. What trained besides the adapter (`train`) keeps its values.

    Raises:
        ValueError: if the model holds no adapter, or one that cannot be folded in: because of what it is, or because a
            weight that it would change is another layer's too, or is computed from others. The message says why, and
            nothing has changed.
    """
    compiled, model = model, uncompiled(model)
    if (held := injection(model)) is None:
        raise ValueError(f"{type(model).__name__} holds no adapter: nothing to merge")
    if held.adapter.not_mergeable:
        raise ValueError(f"{held.adapter.name} cannot be merged: {held.adapter.not_mergeable}")
    extended = [(name, module) for name, module in model.named_modules() if isinstance(module, Extension)]
    _check_untied(model, extended)
    _check_own_weights(extended)
    with without_autocast(model):
        for _, module in extended:
            module.merge()
    return_to_fast_path(model)
    object.__setattr__(model, "injection", Injection(held.adapter, held.train, merged=True))
    return compiled


def _check_untied(model: nn.Module, extended: Iterable[tuple[str, nn.Module]]) -> None:
    """Raise ValueError if a parameter of an adapted module, or its memory, is that of another module too."""
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(parameter.data_ptr() or id(parameter), []).append(path)  # 0: on the meta device, or empty
    for path, module in extended:
        for name, parameter in module.named_parameters(recurse=False):
            if others := [owner for owner in owners[parameter.data_ptr() or id(parameter)] if owner != path]:
                raise ValueError(
                    f"{path} cannot be merged: its {name} is tied to {others[0]}, which would change too; untie them "
                    "(give one a parameter of its own), or keep the adapter as it is"
                )


def _check_own_weights(extended: Iterable[tuple[str, nn.Module]]) -> None:
    """Raise ValueError if a weight of an adapted module is no parameter: the next forward pass would replace it."""
    for path, module in extended:
        for name in ("weight", "bias", "in_proj_weight", "in_proj_bias"):
            if not isinstance(getattr(module, name, None), nn.Parameter | None):
                raise ValueError(
                    f"{path} cannot be merged: its {name} is computed from other parameters (pruning, weight_norm, a "
                    "parametrization), and what is added to it would be lost; make that permanent first (prune.remove, "
                    "parametrize.remove_parametrizations, remove_weight_norm)"
                )


@contextmanager
def without_autocast(model: nn.Module) -> Iterator[None]:
    """Products of weights are computed in their own dtype inside, also where the caller trains under autocast."""
    with ExitStack() as stack:
        for kind in {parameter.device.type for parameter in model.parameters()} - {"meta"}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield

"""Record the rank-1 subspaces of every low-rank update while a model runs."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn


class Subspaces(NamedTuple):
    """The r rank-1 parts of one low-rank update on N samples: delta[n] = sum_i activations[n, i] basis[i] (Eq. 4)."""

    activations: Tensor
    """(N, r), with the adapter's scale folded in."""
    basis: Tensor
    """(r, d_out)."""


@contextmanager
def capture(model: nn.Module) -> Iterator[dict[str, Subspaces]]:
    """Collect the subspaces of every adapted layer of `model` that runs inside the context.

        with capture(model) as subspaces:
            output = model(inputs)
        penalty = ReSoRA("linear", weight=1e-2)(subspaces)

    Nothing is computed twice: the activations are those of the forward pass itself, with their graph. Any module with
    an attribute `record` takes part; it calls `record(role, activations, basis, leading shape)` while the attribute is
    set. A layer that runs several times in the context adds up its samples.

    Samples are tokens, pixels or frames. A padding token is none: the 2-D `attention_mask` (batch, length) that a
    module around the layer was called with is found, and the positions where it is zero are left out.

    Close the context before `backward`, so that gradient checkpointing does not record its second forward pass.

    Yields:
        dict: "<layer>.<role>" -> Subspaces, filled while the model runs.

    Raises:
        ValueError: if the model holds no layer to capture.
    """
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "record")}
    if not layers:
        raise ValueError(f"{type(model).__name__} holds no low-rank layer: inject an adapter such as LoRA first")
    subspaces: dict[str, Subspaces] = {}
    with _attention_masks(model, layers) as masks, ExitStack() as stack:
        for name, layer in layers.items():
            if layer.record is not None:
                raise RuntimeError(f"{name} is being captured already: leave the outer capture(model) first")
            stack.callback(setattr, layer, "record", None)
            layer.record = _recorder(subspaces, name, masks)
        yield subspaces


def _recorder(subspaces: dict[str, Subspaces], name: str, masks: list[Tensor]) -> Any:
    def record(role: str, activations: Tensor, basis: Tensor, shape: torch.Size) -> None:
        mask = next((mask for mask in reversed(masks) if mask.shape == shape), None)
        if mask is not None:
            activations = activations[mask.reshape(-1).bool()]
        key = f"{name}.{role}"
        if (earlier := subspaces.get(key)) is not None:
            activations = torch.cat([earlier.activations, activations])
        subspaces[key] = Subspaces(activations, basis)

    return record


@contextmanager
def _attention_masks(model: nn.Module, layers: dict[str, nn.Module]) -> Iterator[list[Tensor]]:
    """The 2-D attention masks of the modules that are running now, innermost last."""
    masks: list[Tensor] = []
    pushed: list[bool] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments.get("attention_mask")
        found = isinstance(mask, Tensor) and mask.dim() == 2
        pushed.append(found)
        if found:
            masks.append(cast(Tensor, mask))

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if pushed.pop():
            masks.pop()

    with ExitStack() as stack:
        for name, module in model.named_modules():
            around = any(layer.startswith(f"{name}." if name else "") for layer in layers)
            if around and "attention_mask" in inspect.signature(module.forward).parameters:
                stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(after, always_call=True).remove)
        yield masks

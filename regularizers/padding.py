"""Which samples of a layer's input are padding: the attention masks of the modules around it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Masks(NamedTuple):
    """What a module that takes an attention mask was called with."""

    own: Tensor | torch.Size | None
    """The mask; without one, the (batch, length) that it stands for, all of them real; None if that is not known."""
    encoder: Tensor | None


def mask_of(name: str, shape: torch.Size, masks: list[Masks]) -> Tensor | None:
    """The mask of a layer's input of this shape, from the innermost module that takes one; None if all is real."""
    found: Tensor | torch.Size | None = None
    for own, _ in reversed(masks):
        if own is None:
            break
        if (own if isinstance(own, torch.Size) else own.shape) == shape:
            found = own
            break
        if isinstance(own, Tensor) and own.shape == shape[::-1]:
            raise ValueError(
                f"{name} has inputs of {tuple(shape)}, but the attention mask is {tuple(own.shape)}: inputs of "
                "(length, batch) are not supported; leave it out with capture(model, layers=PATTERN)"
            )
    mask = found if isinstance(found, Tensor) else None
    encoder = next((m.encoder for m in reversed(masks) if m.encoder is not None and m.encoder.shape == shape), None)
    if encoder is None:
        return mask
    own_tokens = torch.ones_like(encoder) if mask is None else mask
    if found is not None and not torch.equal(own_tokens.bool(), encoder.bool()):
        raise ValueError(
            f"{name} may see the tokens of attention_mask or those of encoder_attention_mask, which have the same "
            "length; leave it out with capture(model, layers=PATTERN)"
        )
    return encoder


@contextmanager
def attention_masks(model: nn.Module, layers: Collection[str]) -> Iterator[list[Masks]]:
    """The 2-D attention masks of the modules that are running now, innermost last."""
    masks: list[Masks] = []
    pushed: list[bool] = []

    def before(signature: inspect.Signature, bound: bool) -> Callable[..., None]:
        def push(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            called = kwargs
            if args:
                called = signature.bind_partial(*((module, *args) if bound else args), **kwargs).arguments
            mask, encoder = called.get("attention_mask"), called.get("encoder_attention_mask")
            # Of another kind, (batch, 1, length, length) say, it tells nothing: what a module further out has counts.
            tells = mask is None or (isinstance(mask, Tensor) and mask.dim() == 2)
            pushed.append(tells)
            if tells:
                inputs = (called.get(name) for name in ("input_ids", "inputs_embeds", "hidden_states"))
                length = next((tensor.shape[:2] for tensor in inputs if isinstance(tensor, Tensor)), None)
                given = encoder if isinstance(encoder, Tensor) and encoder.dim() == 2 else None
                masks.append(Masks(length if mask is None else mask, given))

        return push

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if pushed.pop():
            masks.pop()

    with ExitStack() as stack:
        for module in _around(model, layers):
            function = getattr(module.forward, "__func__", None)  # none where an instance brings its own forward
            signature = _signature(function) if function else inspect.signature(module.forward)
            if "attention_mask" in signature.parameters:
                push = before(signature, bound=function is not None)
                stack.callback(module.register_forward_pre_hook(push, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(after, always_call=True).remove)
        yield masks


@lru_cache(maxsize=512)
def _signature(function: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(function)


def _around(model: nn.Module, layers: Collection[str]) -> list[nn.Module]:
    """The modules that hold one of the layers, the model itself included."""
    names = {""}
    for layer in layers:
        while layer := layer.rpartition(".")[0]:
            names.add(layer)
    return list({id(module): module for module in map(model.get_submodule, names)}.values())

"""Which samples of a layer's input are padding: the masks and the token ids of the modules around it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

OWN_PADDING = ("key_padding_mask", "src_key_padding_mask", "tgt_key_padding_mask")
"""Arguments of torch's own modules, which are True, or -inf, at padding."""
ENCODERS_PADDING = "memory_key_padding_mask"


class Masks(NamedTuple):
    """What a module that takes a mask was called with; masks are (batch, length), True at real tokens."""

    own: Tensor | torch.Size | None
    """The mask; without one, the (batch, length) that it stands for, all of them real; None if that is not known."""
    encoder: Tensor | None
    """That of the keys and values of cross-attention."""


class Padding:
    """What is known while a model runs: the masks of the modules that are running now, and the texts of CLIP's towers.

    Attributes:
        masks: innermost last.
        read: what each mask that was handed from module to module says, so that it is one mask to all of their layers.
        texts: the prefix of a tower's layers -> which of the token ids that it embedded last are real.
    """

    def __init__(self) -> None:
        self.masks: list[Masks] = []
        self.read: dict[Any, tuple[Tensor, Tensor]] = {}
        self.texts: dict[str, Tensor] = {}

    def real(self, given: Tensor, meaning: Callable[[Tensor], Tensor]) -> Tensor:
        """`meaning(given)`, True at real tokens: the same tensor while one module is running."""
        key = id(given), meaning
        if key not in self.read:
            self.read[key] = given, meaning(given)  # the first is held, so that its id stays its own
        return self.read[key][1]

    def mask_of(self, name: str, shape: torch.Size) -> Tensor | None:
        """The mask of the input of layer `name`, of this shape without its channels; None if all is real.

        A CLIP text tower's own token ids come first, then the innermost module that takes a mask.

        Raises:
            ValueError: if the positions of a mask cannot be matched with those of the layer.
        """
        masks = [Masks(text, None) for prefix, text in self.texts.items() if name.startswith(prefix)]
        masks += reversed(self.masks)
        found: Tensor | torch.Size | None = None
        for own, _ in masks:
            if own is None:
                break
            if (own if isinstance(own, torch.Size) else own.shape) == shape:
                found = own
                break
            if isinstance(own, Tensor) and own.shape == shape[::-1]:
                raise ValueError(
                    f"{name} has inputs of {tuple(shape)}, but its mask is {tuple(own.shape)}: inputs of "
                    "(length, batch) are not supported; leave it out with capture(model, layers=PATTERN)"
                )
        mask = found if isinstance(found, Tensor) else None
        encoder = next((m.encoder for m in masks if m.encoder is not None and m.encoder.shape == shape), None)
        if encoder is None:
            return mask
        own_tokens = torch.ones_like(encoder) if mask is None else mask
        if found is not None and not torch.equal(own_tokens, encoder.to(own_tokens.device)):
            raise ValueError(
                f"{name} may see the tokens of the module's own mask or those of the encoder's, which have the same "
                "length; leave it out with capture(model, layers=PATTERN)"
            )
        return encoder


@contextmanager
def watch_padding(model: nn.Module, layers: Collection[str]) -> Iterator[Padding]:
    """Fill a `Padding` while `model` runs, for what is around these layers and for the layers themselves."""
    padding = Padding()
    with ExitStack() as stack:
        for name, module in _around(model, layers).items():
            function = getattr(module.forward, "__func__", None)  # none where an instance brings its own forward
            signature = _signature(function) if function else inspect.signature(module.forward)
            if _takes_mask(signature):
                push, pop = _hooks(padding, signature, bound=function is not None)
                stack.callback(module.register_forward_pre_hook(push, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(pop, always_call=True).remove)
            if (embedding := _text_embedding(module)) is not None:
                prefix = f"{name}.transformer." if name else "transformer."
                keep = _keep_text(padding.texts, prefix, module)
                stack.callback(embedding.register_forward_pre_hook(keep).remove)
        yield padding


def _around(model: nn.Module, layers: Collection[str]) -> dict[str, nn.Module]:
    """The modules that hold one of the layers, the model itself included, and the layers; each once."""
    names = {""}
    for layer in layers:
        while layer:
            names.add(layer)
            layer = layer.rpartition(".")[0]
    by_module = {id(module): (name, module) for name in names for module in (model.get_submodule(name),)}
    return dict(by_module.values())


# ---- masks that are arguments


@lru_cache(maxsize=512)
def _signature(function: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(function)


def _takes_mask(signature: inspect.Signature) -> bool:
    names = signature.parameters.keys()
    # nn.Transformer takes the masks of its encoder and of its decoder, and hands them on.
    both = {"src_key_padding_mask", "tgt_key_padding_mask"} <= names
    return "attention_mask" in names or (not both and not names.isdisjoint(OWN_PADDING))


def _hooks(
    padding: Padding, signature: inspect.Signature, bound: bool
) -> tuple[Callable[..., None], Callable[..., None]]:
    """What is called before and after a module's forward pass: its masks are added, and taken away."""
    pushed: list[bool] = []

    def push(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        called: Mapping[str, Any] = kwargs
        if args:
            called = signature.bind_partial(*((module, *args) if bound else args), **kwargs).arguments
        in_hugging_face = "attention_mask" in signature.parameters
        found = _attention_masks(called, padding) if in_hugging_face else _padding_masks(module, called, padding)
        pushed.append(found is not None)
        if found is not None:
            padding.masks.append(found)

    def pop(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if pushed.pop():
            padding.masks.pop()
        if not padding.masks:
            padding.read.clear()  # a caller may fill the same tensor anew

    return push, pop


def _attention_masks(called: Mapping[str, Any], padding: Padding) -> Masks | None:
    """Of a call in the manner of transformers: nonzero is real. None where it tells nothing."""
    mask, encoder = called.get("attention_mask"), called.get("encoder_attention_mask")
    given = padding.real(encoder, Tensor.bool) if isinstance(encoder, Tensor) and encoder.dim() == 2 else None
    if mask is None:
        inputs = (called.get(name) for name in ("input_ids", "inputs_embeds", "hidden_states"))
        return Masks(next((tensor.shape[:2] for tensor in inputs if isinstance(tensor, Tensor)), None), given)
    # Of another kind, (batch, 1, length, length) say, it tells nothing: what a module further out has counts.
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    return Masks(padding.real(mask, Tensor.bool), given)


def _padding_masks(module: Any, called: Mapping[str, Any], padding: Padding) -> Masks | None:
    """Of a call in the manner of torch: True, or -inf, is padding. None where it tells nothing."""
    given = next((called[name] for name in OWN_PADDING if called.get(name) is not None), None)
    both = (given, called.get(ENCODERS_PADDING))
    own, encoder = (None if mask is None else padding.real(mask, _not_padding) for mask in both)
    if own is None and encoder is None:
        return None
    crossed = "query" in called and called["query"] is not called.get("key")
    if own is not None and not crossed:
        return Masks(own, encoder)
    # The mask is that of the keys and values alone. The others' is the one further out, or they are all real.
    inputs: Tensor = next(called[name] for name in ("query", "tgt") if name in called)
    batch_first = getattr(module, "batch_first", True)
    all_real = inputs.shape[:2] if batch_first else inputs.shape[:2][::-1]
    return Masks(padding.masks[-1].own if padding.masks else all_real, own if crossed else encoder)


def _not_padding(padding: Tensor) -> Tensor:
    return padding == 0 if padding.dtype == torch.bool else ~padding.isneginf()


# ---- CLIP's text towers, which take token ids and no mask


def _text_embedding(module: Any) -> nn.Module | None:
    """The token embedding of a text tower in the manner of open_clip whose texts have an end, or None for others.

    Towers that pool elsewhere than at the end of a text (SigLIP's) read all of their positions.
    """
    embedding, transformer = (module._modules.get(name) for name in ("token_embedding", "transformer"))
    found = transformer is not None and "resblocks" in transformer._modules and _pool_type(module) in ("argmax", "eos")
    return embedding if found else None


def _pool_type(tower: Any) -> str:
    """The name of open_clip's `CLIP`, that of its `TextTransformer`, or what OpenAI's CLIP does."""
    pool_type: str = getattr(tower, "text_pool_type", getattr(tower, "pool_type", "argmax"))
    return pool_type


def _keep_text(texts: dict[str, Tensor], prefix: str, tower: Any) -> Callable[..., None]:
    """A hook on the token embedding of `tower` that keeps which tokens are real.

    A text ends at the token that the tower pools: the first end-of-text id, or the highest id.
    """
    end_id: Any = getattr(tower, "text_eos_id", getattr(tower, "eos_id", None))

    def keep(embedding: nn.Module, args: tuple[Any, ...]) -> None:
        ids: Tensor = args[0]
        end = (ids if _pool_type(tower) == "argmax" else torch.eq(ids, end_id).int()).argmax(dim=-1, keepdim=True)
        real = torch.arange(ids.shape[-1], device=ids.device) <= end
        if getattr(tower, "cls_emb", None) is not None:  # CoCa's class token comes last
            real = torch.cat([real, real.new_ones(len(real), 1)], dim=1)
        texts[prefix] = real

    return keep

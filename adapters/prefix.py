"""Prefix tuning (Li and Liang, ACL 2021, https://arxiv.org/abs/2101.00190), for BERT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapters.extend import Extension, extend
from adapters.towers import find_towers


@dataclass(frozen=True, kw_only=True)
class Prefix:
    """Trainable keys and values that every token attends to, in each layer, besides those of the text.

    With p prompts, width d and L layers: keys, values (L, 2, p, d) = W2 tanh(W1 E + b1) + b2, with E (p, d),
    W1 (hidden, d), W2 (2 L d, hidden). 9,872,384 parameters in BERT-base ("Prompt" in Table 1, where the 787,456 of
    VSE-infinity's projection are counted as well); what a deployed model needs is the result, 552,960 numbers.
    Padding stays masked, and positions are not shifted. Initialisation: PyTorch's, E normal with deviation 1.

    Args:
        prompts: the number p of keys, and of values, in each layer. Default: 30.
        hidden: width of the network that makes them. Default: 512.

    Raises:
        ValueError: if one of them is below 1.
    """

    name: ClassVar[str] = "prefix"
    not_mergeable: ClassVar[str] = "it adds keys and values to attention, not to weights"
    prompts: int = 30
    hidden: int = 512

    def __post_init__(self) -> None:
        if min(self.prompts, self.hidden) < 1:
            raise ValueError(
                f"prefix needs prompts >= 1 and hidden >= 1, but got prompts={self.prompts}, hidden={self.hidden}"
            )

    def apply(self, model: nn.Module) -> None:
        towers = find_towers(model, ("bert",), self.name)
        attentions: list[list[Any]] = [
            [getattr(block.module.attention, "self", None) for block in tower.blocks] for tower in towers
        ]
        for tower, layers in zip(towers, attentions, strict=True):
            if any(
                not hasattr(layer, "num_attention_heads") or getattr(layer, "is_decoder", False) for layer in layers
            ):
                raise ValueError(
                    f"prefix works on encoders with BERT's attention.self, but {tower.name or 'the model'} is a "
                    f"{type(tower.module).__name__}, a decoder or with other attention"
                )
        for tower, layers in zip(towers, attentions, strict=True):
            like = layers[0].key.weight
            with torch.device(like.device):
                network = PrefixNetwork(
                    self.prompts, tower.width, self.hidden, len(layers), layers[0].num_attention_heads
                )
            extend(tower.module.encoder, PrefixedEncoder).prefix = network.to(like.dtype)
            for index, layer in enumerate(layers):
                extend(layer, PrefixedSelfAttention).index = index


class PrefixNetwork(nn.Module):
    """The keys and values of all layers, from one embedding."""

    def __init__(self, prompts: int, width: int, hidden: int, layers: int, heads: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(prompts, width)
        self.inner = nn.Linear(width, hidden)
        self.outer = nn.Linear(hidden, layers * 2 * width)
        self.heads = heads

    def keys_and_values(self, layer: int) -> tuple[Tensor, Tensor]:
        """The prefix of a layer, (heads, p, d / heads) each."""
        states = torch.tanh(self.inner(self.embedding.weight))  # (p, hidden)
        size = 2 * self.embedding.embedding_dim
        rows = slice(layer * size, (layer + 1) * size)
        prefix = F.linear(states, self.outer.weight[rows], self.outer.bias[rows])  # (p, 2 d)
        keys, values = prefix.view(len(prefix), 2, self.heads, -1).permute(1, 2, 0, 3).unbind()
        return keys, values


class PrefixedEncoder(Extension):
    """BERT's stack of layers; it owns the network, and the layers hand it on to their attention.

    The network itself goes along, not its result: a layer that gradient checkpointing runs again then makes its keys
    and values again, in a graph of its own, which the reentrant kind needs.
    """

    added = ("prefix",)
    prefix: PrefixNetwork

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, prefix=self.prefix, **kwargs)


class PrefixedSelfAttention(Extension):
    """BERT's self-attention in layer `index`, over the prefix and the text."""

    added = ("index",)
    index: int

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: None = None,  # of decoders
        *,
        prefix: PrefixNetwork,
        **kwargs: Any,
    ) -> Any:
        """hidden_states (B, T, d) -> the stock module's outputs; attention weights are (B, heads, T, p + T)."""
        keys, values = prefix.keys_and_values(self.index)
        if attention_mask is not None:
            attention_mask = seen(attention_mask, keys.shape[1])
        cache = Prepended(keys, values)
        return super().forward(hidden_states, attention_mask=attention_mask, past_key_values=cache, **kwargs)


class Prepended:
    """Stands where a decoder has its cache: the attention of transformers asks it for the keys and values to use."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any) -> tuple[Tensor, Tensor]:
        """(B, heads, T, d / heads) each -> (B, heads, p + T, d / heads) each."""
        batch = len(keys)
        return (
            torch.cat([self.keys.to(keys.dtype).expand(batch, -1, -1, -1), keys], dim=2),
            torch.cat([self.values.to(values.dtype).expand(batch, -1, -1, -1), values], dim=2),
        )


def seen(mask: Tensor, count: int) -> Tensor:
    """A mask (..., T), added to the logits or with True where attention is allowed -> (..., p + T), seen by all."""
    if not isinstance(mask, Tensor):
        raise NotImplementedError(
            f"prefix works with the sdpa and eager attention of transformers, but got a {type(mask).__name__} as mask"
        )
    return F.pad(mask, (count, 0), value=0.0 if mask.is_floating_point() else 1)

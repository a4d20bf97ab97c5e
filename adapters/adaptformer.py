"""AdaptFormer: a bottleneck beside each MLP (Chen et al., NeurIPS 2022, https://arxiv.org/abs/2205.13535).

A block of ViT, Swin or CLIP computes x1 + f(mlp(norm(x1))) and shows x1 to nobody but its norm. So the norm hands x1 on
beside its output, and each module after it does the same, until the last one adds the bottleneck's output: x1 goes the
way of the data (as in `adapters.carry`), and nothing has to be remembered from one module call to another.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from adapters.bottleneck import Bottleneck, BottleneckAdapter, Bottlenecked
from adapters.extend import Extension
from adapters.towers import Block, Tower


class Forking(Extension):
    """The norm before the MLP: x1 -> (norm(x1), x1)."""

    def forward(self, x1: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x1), x1


class Handing(Extension):
    """The MLP and what follows it: (h, x1) -> (module(h), x1)."""

    def forward(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        h, x1 = _both(pair)
        return super().forward(h), x1


class Joining(Bottlenecked):
    """The last module before the residual sum: (h, x1) -> module(h) + bottleneck(x1)."""

    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        h, x1 = _both(pair)
        out: Tensor = super().forward(h) + self.bottleneck(x1)
        return out


def _both(pair: Any) -> tuple[Tensor, Tensor]:
    if not isinstance(pair, tuple):  # a batch of two would unpack without a word
        raise TypeError("adaptformer: this module runs after its block's second norm, which hands it a pair")
    h, x1 = pair
    return h, x1


class ResidualSum(Bottlenecked):
    """The end of a BERT layer, (h, x1) -> LayerNorm(dense(h) + x1): all it does with x1 is to add it."""

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        out: Tensor = super().forward(hidden_states, input_tensor + self.bottleneck(input_tensor))
        return out


class Parallel(Bottlenecked):
    """ConvNeXt's MLP: x -> mlp(x) + bottleneck(x)."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x) + self.bottleneck(x)
        return out


# Kind of tower -> the modules that follow one another in x1 + f(mlp(norm(x1))); those after the MLP may be absent.
CHAINS: dict[str, tuple[str, ...]] = {
    "vit": ("norm2", "mlp", "ls2", "drop_path2"),
    "swin": ("norm2", "mlp", "drop_path2"),
    "clip_vision": ("ln_2", "mlp", "ls_2"),
    "clip_text": ("ln_2", "mlp", "ls_2"),
}


@dataclass(frozen=True, kw_only=True)
class AdaptFormer(BottleneckAdapter):
    r"""Add a bottleneck in parallel to the MLP: :math:`x_1 + mlp(LN(x_1)) + s\,up(drop(ReLU(down(x_1))))`.

    down and up are linear maps with biases. The input is the residual stream after attention, x_1, not LN(x_1): the
    authors' code does so, and they say that it is right where their Eq. 3 differs. Neither stochastic depth nor layer
    scale touches the output. W_down starts uniform in +-1/sqrt(d), W_up and the biases at zero, so that the adapted
    model starts as the backbone.

    BERT adds it before the norm that ends the layer. ConvNeXt has no residual stream between its depthwise convolution
    and its MLP: there the input is the MLP's, and the block's layer scale (gamma) scales the output too.

    Args:
        bottleneck: channels of each bottleneck. Default: 64, as published; 8 gives the 0.16 M parameters of Table 2.
        bottleneck_pattern: see `BottleneckAdapter`.
        scale: s. Default: 0.1.
        dropout: probability of dropping a value of the bottleneck in training. Default: 0.1.

    Raises:
        ValueError: for a bottleneck below 1, a scale that is not positive or a dropout outside [0, 1).
    """

    name: ClassVar[str] = "adaptformer"
    bottleneck: int = 64
    scale: float = 0.1
    dropout: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale <= 0 or not 0 <= self.dropout < 1:
            raise ValueError(
                f"{self.name} needs scale > 0 and 0 <= dropout < 1, but got scale={self.scale}, dropout={self.dropout}"
            )

    def sites(self, tower: Tower, block: Block) -> Iterator[tuple[str, type[Extension]]]:
        if tower.kind == "bert":
            yield "output", ResidualSum
        elif tower.kind == "convnext":
            yield "mlp", Parallel
        else:
            norm, mlp, *after = CHAINS[tower.kind]
            there = [name for name, _ in block.module.named_children()]
            chain = [norm, mlp, *(name for name in after if name in there)]
            # Blocks declare their modules in the order in which they call them. Where the norm comes last (Swin v2), or
            # the block itself scales the MLP's output (EVA), there is nothing to hand x1 along.
            own = [name for name, _ in block.module.named_parameters(recurse=False)]
            if [name for name in there if name in chain] != chain or len(chain) < 3 or own:
                raise ValueError(
                    f"{self.name} needs blocks that add {' -> '.join(chain)} to their input, but {block.name} "
                    f"({type(block.module).__name__}) has, in this order, {', '.join(there + own)}"
                )
            yield norm, Forking
            yield from ((name, Handing) for name in chain[1:-1])
            yield chain[-1], Joining

    def module(self, width: int, size: int, like: Tensor, channels: int) -> Bottleneck:
        made = Bottleneck(width, size, F.relu, self.scale, self.dropout, like, channels)
        nn.init.kaiming_uniform_(made.down.weight, a=math.sqrt(5))
        nn.init.zeros_(made.up.weight)
        return made

"""Houlsby adapters: a bottleneck after each sublayer (ICML 2019, https://arxiv.org/abs/1902.00751)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from adapters.bottleneck import Bottleneck, BottleneckAdapter, Bottlenecked
from adapters.extend import Extension
from adapters.towers import Block, Tower


class Followed(Bottlenecked):
    """A module with a bottleneck on its output h, which it gives as h + bottleneck(h)."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module itself takes -> what it gives; of a tuple (nn.MultiheadAttention's) the first item counts."""
        out = super().forward(*args, **kwargs)
        if isinstance(out, tuple):
            return (out[0] + self.bottleneck(out[0]), *out[1:])
        return out + self.bottleneck(out)


class Preceded(Bottlenecked):
    """A module with a bottleneck on its input h, which it takes as h + bottleneck(h)."""

    def forward(self, h: Tensor) -> Tensor:
        out: Tensor = super().forward(h + self.bottleneck(h))
        return out


SUBLAYERS = ("attention", "mlp")

# Kind of tower -> sublayer -> what the bottleneck goes on. In all of them it is the last before the residual sum but
# for layer scale and stochastic depth.
PLACES: dict[str, dict[str, tuple[str, type[Bottlenecked]]]] = {
    # The last module before the sum is the dropout of the dense output, also where it drops nothing.
    "bert": {"attention": ("attention.output.dropout", Followed), "mlp": ("output.dropout", Followed)},
    "vit": {"attention": ("attn", Followed), "mlp": ("mlp", Followed)},
    # Swin's attention sees windows, with padding; by the time of its drop path they are an image again.
    "swin": {"attention": ("drop_path1", Preceded), "mlp": ("mlp", Followed)},
    "convnext": {"mlp": ("mlp", Followed)},
    # CLIP's MLP is a Sequential, which would run a further child of its own accord.
    "clip_vision": {"attention": ("attn", Followed), "mlp": ("mlp.c_proj", Followed)},
    "clip_text": {"attention": ("attn", Followed), "mlp": ("mlp.c_proj", Followed)},
}


@dataclass(frozen=True, kw_only=True)
class Houlsby(BottleneckAdapter):
    r"""Add a bottleneck to a sublayer's output: :math:`h + f(h W_{down}^T + b_{down}) W_{up}^T + b_{up}`.

    It stands after the attention's output projection and after the MLP's, each time before the residual sum (and, in
    BERT, before the norm that follows it). f is SiLU, weights start at N(0, 0.02^2) and biases at zero, as in the
    library whose preset the paper's Table 1 counts agree with: BERT-base with 48 channels has 1,789,056 parameters,
    with VSE-infinity's projection 2.6 M. So the adapted model starts near the backbone, not at it. Houlsby et al.
    also train the norms; here they stay frozen, as in that library.

    ConvNeXt has no attention: its blocks have the bottleneck after the MLP, and their layer scale (gamma) scales what
    it adds.

    Args:
        bottleneck: channels of each bottleneck. Default: 48, a 16th of BERT-base's width; the paper is silent.
        bottleneck_pattern: see `BottleneckAdapter`.
        sublayers: after which of "attention" and "mlp". Default: both; ("mlp",) is the variant that VPT and NOAH
            compare with.

    Raises:
        ValueError: for a bottleneck below 1 or unknown sublayers.
    """

    name: ClassVar[str] = "houlsby"
    bottleneck: int = 48
    sublayers: tuple[str, ...] = SUBLAYERS

    def __post_init__(self) -> None:
        super().__post_init__()
        given = (self.sublayers,) if isinstance(self.sublayers, str) else tuple(self.sublayers)
        object.__setattr__(self, "sublayers", given)
        if not given or set(given) - set(SUBLAYERS) or len(set(given)) != len(given):
            raise ValueError(f"{self.name} needs sublayers out of {', '.join(SUBLAYERS)}, each once, but got {given}")

    def sites(self, tower: Tower, block: Block) -> Iterator[tuple[str, type[Extension]]]:
        places = PLACES[tower.kind]
        if not set(self.sublayers) & set(places):
            raise ValueError(
                f"{self.name} with sublayers={self.sublayers}: blocks of a {tower.kind} have {', '.join(places)} only"
            )
        yield from (place for sublayer, place in places.items() if sublayer in self.sublayers)

    def module(self, width: int, size: int, like: Tensor, channels: int) -> Bottleneck:
        made = Bottleneck(width, size, F.silu, 1.0, 0.0, like, channels)
        nn.init.normal_(made.down.weight, std=0.02)
        nn.init.normal_(made.up.weight, std=0.02)
        return made

"""LST: ladder side-tuning (Sung et al., NeurIPS 2022, https://arxiv.org/abs/2206.06522)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from adapters.carry import CarryingBlock
from adapters.extend import extend
from adapters.feature_tower import feature_tower, feature_width
from adapters.narrow import narrow, number_of_heads, residual_strength, strongest
from adapters.side import ONE_WIDTH, output_width
from adapters.towers import Tower, find_towers

TEMPERATURE = 0.1


@dataclass(frozen=True, kw_only=True)
class LST:
    r"""A narrow copy of the backbone beside it, which reads its hidden states and gives the output in its place.

    With :math:`h_0` the embeddings, :math:`h_l` the output of the frozen block l and :math:`T = 0.1`,

    .. math:: s_0 = D_0 h_0, \quad s_l = \mathrm{Block}_l(g_l s_{l-1} + (1 - g_l) D_l h_l), \quad
        g_l = \sigma(\alpha_l / T), \quad \mathrm{output} = U s_L

    Each side block is a copy of the backbone's block at 1 / `reduction` of its width, with as many heads, cut down to
    its strongest channels (see `narrow`). The gates start in the middle (alpha = 0), the maps D and U as any
    `nn.Linear`, with biases: the reading that gives the paper's 2.38 M parameters on ViT-B/16 (the authors' code has
    no biases there, 2.37 M).

    In ViT and BERT the output replaces that of the last block. ViT's final norm comes after it and stays the backbone's
    own, frozen; BERT has no norm after its blocks, and there the output may have another width. In CLIP the output is
    the tower's feature: U takes s_L at the token that CLIP pools to the shared space, in place of final norm and
    projection (with reduction 4, 10,655,552 parameters; no reading gives the 11.2 M of the ReSoRA paper's Table 1).

    The backbone runs without a graph: nothing in its blocks gets a gradient, nor CLIP's projections, also if `train`
    names them. Its dropout is on in training. Under gradient checkpointing, states go from block to block as tuples,
    which needs use_reentrant=False (the libraries' default).

    Args:
        reduction: of the width. Default: 8, as in the LST paper and for the ReSoRA paper's Table 2; its Table 1 is 4.
        output_dim: channels of BERT's output tokens, for a head that takes the place of a projection. Default: BERT's.

    Raises:
        ValueError: for a reduction below 2 or an output_dim below 1. `apply` raises it where a tower's heads do not
            divide the side network's width, or what follows a tower does not take output_dim channels.
    """

    name: ClassVar[str] = "lst"
    not_mergeable: ClassVar[str] = "a side network runs beside the backbone and replaces its output"
    reduction: int = 8
    output_dim: int | None = None

    def __post_init__(self) -> None:
        if self.reduction < 2 or (self.output_dim is not None and self.output_dim < 1):
            raise ValueError(
                f"lst needs reduction >= 2 and output_dim >= 1 or None, "
                f"but got reduction={self.reduction}, output_dim={self.output_dim}"
            )

    def apply(self, model: nn.Module) -> None:
        for tower in find_towers(model, ONE_WIDTH, self.name):
            ladder = self._ladder(tower)
            if tower.kind.startswith("clip"):
                extend(tower.module, feature_tower(tower)).side = FeatureLadder(ladder)
                continue
            for index, (block, rung) in enumerate(zip(tower.blocks, ladder, strict=True)):
                beside = extend(block.module, LadderBlock)
                beside.rung, beside.last = rung, index == len(ladder) - 1

    def _ladder(self, tower: Tower) -> list[Rung]:
        blocks = [block.module for block in tower.blocks]
        if tower.width % (self.reduction * (heads := number_of_heads(blocks[0]))):
            raise ValueError(
                f"lst with reduction={self.reduction}: {tower.name or 'the model'} has width {tower.width} and {heads} "
                f"heads, and its side network's width {tower.width / self.reduction:g} is no multiple of them"
            )
        width = feature_width if tower.kind.startswith("clip") else output_width
        out = width(tower, self.output_dim, self.name)
        kept = strongest(residual_strength(blocks)[None], tower.width // self.reduction)
        like = tower.blocks[0].like
        ladder = [Rung(narrow(block, self.reduction, kept), tower.width, len(kept)) for block in blocks]
        ladder[0].start = nn.Linear(tower.width, len(kept))
        ladder[-1].up = nn.Linear(len(kept), out)
        for rung in ladder:  # but for its block, whose parameters are as the stock block's, norms in float32 too
            rung.alpha = nn.Parameter(like.new_zeros(()))
            for new in (rung.start, rung.down, rung.up):
                if new is not None:
                    new.to(device=like.device, dtype=like.dtype)
        return ladder


class Rung(nn.Module):
    """The trainable part beside one block: gate, map down, side block; in the first D_0, in the last the map up."""

    def __init__(self, block: nn.Module, width: int, side: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(()))
        self.down = nn.Linear(width, side)
        self.block = block
        self.start: nn.Linear | None = None
        self.up: nn.Linear | None = None

    def mix(self, side: Tensor, hidden: Tensor) -> Tensor:
        """s_{l-1} (B, N, d / R) and h_l (B, N, d) -> the side block's input (B, N, d / R)."""
        gate = torch.sigmoid(self.alpha / TEMPERATURE)
        return gate * side + (1 - gate) * self.down(hidden)


class LadderBlock(CarryingBlock):
    """A block of the backbone, frozen and without a graph; what is carried is s_l."""

    added = (*CarryingBlock.added, "rung")
    rung: Rung

    def around(self, x: Tensor, carried: Any, block: Callable[..., Tensor]) -> tuple[Tensor, Any]:
        x = x.detach()  # the embeddings may have a graph
        with torch.no_grad():
            hidden = block(x)
        side = self.rung.start(x) if self.rung.start is not None else carried
        side = block(self.rung.mix(side, hidden), self.rung.block)
        return (hidden if self.rung.up is None else self.rung.up(side)), side


class FeatureLadder(nn.Module):
    """The ladder beside a tower of CLIP."""

    def __init__(self, rungs: list[Rung]) -> None:
        super().__init__()
        self.rungs = nn.ModuleList(rungs)

    def forward(
        self, states: Sequence[Tensor], feature: Tensor, position: Tensor, _real: Tensor, mask: Tensor | None
    ) -> Tensor:
        """See `FeatureTower.side`: L + 1 hidden states (B, N, d) -> (B, D)."""
        first, last = self.rungs[0].start, self.rungs[-1].up
        assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
        side = first(states[0])
        for rung, hidden in zip(cast(list[Rung], list(self.rungs)), states[1:], strict=True):
            side = rung.block(rung.mix(side, hidden), attn_mask=mask)
        return last(side[torch.arange(len(side), device=side.device), position])

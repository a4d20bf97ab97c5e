"""UniPT: universal parallel tuning (Diao et al., CVPR 2024, https://arxiv.org/abs/2308.14316)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from adapters.carry import CarryingBlock
from adapters.extend import extend
from adapters.feature_tower import feature_tower, feature_width
from adapters.fusion import FeatureFusion, TokenFusion
from adapters.side import ONE_WIDTH, output_width
from adapters.towers import Tower, find_towers


@dataclass(frozen=True, kw_only=True)
class UniPT:
    r"""A small network that reads all hidden states of a frozen backbone and gives the output in its place.

    BERT and ViT (`TokenFusion`): new tokens from the old ones of all layers, around those of the last. They replace the
    output of the last block; ViT's final norm comes after them and stays the backbone's own, frozen (the paper has no
    ViT; this is BERT's form on all tokens).

    CLIP (`FeatureFusion`, in each tower): one feature from the tokens of all layers, around the tower's own feature,
    which it is added to. CLIP's final norm and projection are part of the frozen tower.

    The backbone runs without a graph: nothing in it gets a gradient, CLIP's projections included, also if `train` names
    it. Its dropout is on in training. Linear maps and norms start as PyTorch's. Under gradient checkpointing the states
    are passed on as tuples, which needs use_reentrant=False (the libraries' default).

    Args:
        dim: width m inside. Default: 512, the paper's for BERT and CLIP.
        output_dim: channels of BERT's output tokens, for a head that takes the place of a projection (1,024 in the
            paper's VSE-infinity). Default: BERT's own.

    Raises:
        ValueError: for a size below 1. `apply` raises it where what follows a tower does not take output_dim channels,
            and for CLIP towers that pool in another way than at the class token and at the end of the text.
    """

    name: ClassVar[str] = "unipt"
    not_mergeable: ClassVar[str] = "a side network runs beside the backbone"
    dim: int = 512
    output_dim: int | None = None

    def __post_init__(self) -> None:
        if self.dim < 1 or (self.output_dim is not None and self.output_dim < 1):
            raise ValueError(
                f"unipt needs dim >= 1 and output_dim >= 1 or None, "
                f"but got dim={self.dim}, output_dim={self.output_dim}"
            )

    def apply(self, model: nn.Module) -> None:
        for tower in find_towers(model, ONE_WIDTH, self.name):
            like = tower.blocks[0].like
            fusion = self._fusion(tower).to(device=like.device, dtype=like.dtype)
            if isinstance(fusion, FeatureFusion):
                extend(tower.module, feature_tower(tower)).side = fusion
                continue
            for block in tower.blocks:
                collecting = extend(block.module, CollectingBlock)
                collecting.last = block is tower.blocks[-1]
                collecting.unipt = fusion if collecting.last else None

    def _fusion(self, tower: Tower) -> TokenFusion | FeatureFusion:
        states = len(tower.blocks) + 1
        if tower.kind in ("bert", "vit"):
            return TokenFusion(tower.width, states, self.dim, output_width(tower, self.output_dim, self.name))
        return FeatureFusion(tower.width, states, self.dim, feature_width(tower, self.output_dim, self.name))


class CollectingBlock(CarryingBlock):
    """A block of BERT or ViT, frozen and without a graph; what is carried are the hidden states so far."""

    added = (*CarryingBlock.added, "unipt")
    unipt: TokenFusion | None

    def around(self, x: Tensor, carried: Any, block: Callable[..., Tensor]) -> tuple[Tensor, Any]:
        x = x.detach()  # the embeddings may have a graph
        with torch.no_grad():
            hidden = block(x)
        states = (*(carried or (x,)), hidden)
        return (hidden if self.unipt is None else block(states, self.unipt)), states

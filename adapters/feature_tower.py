"""CLIP towers whose feature a side network replaces: LST and UniPT.

The stock tower runs without a graph; hooks that live as long as one call pick up its hidden states. So gradient
checkpointing, which would run blocks again, has nothing to run again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapters.extend import Extension
from adapters.towers import Tower


class FeatureTower(Extension):
    """A tower of CLIP, frozen and without a graph, whose feature is replaced.

    Attributes:
        side: hidden states (B, N, d), embeddings first; the tower's feature (B, D); the position of the token that it
            pools (B,); which tokens are real (B, N); the mask of attention (N, N) or None -> the new feature (B, D).
    """

    added = ("side",)
    side: nn.Module

    @torch.no_grad()
    def frozen(self, run: Callable[[Tensor], Tensor], x: Tensor) -> tuple[list[Tensor], Tensor]:
        """The tower's hidden states (B, N, d), embeddings first, and its feature (B, D)."""
        own: Any = self
        blocks, states = own.transformer.resblocks, list[Tensor]()
        hooks = [blocks[0].register_forward_pre_hook(lambda _, args: states.append(args[0]))]
        hooks += [block.register_forward_hook(lambda _, __, out: states.append(out)) for block in blocks]
        try:
            feature = run(x)
        finally:
            for hook in hooks:
                hook.remove()
        return states, feature


class FeatureVision(FeatureTower):
    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D)."""
        states, feature = self.frozen(super().forward, images)
        position = torch.zeros(len(feature), dtype=torch.long, device=feature.device)  # the class token
        real = torch.ones(states[0].shape[:2], dtype=torch.bool, device=feature.device)
        new: Tensor = self.side(states, feature, position, real, None)
        return new


class FeatureText(FeatureTower):
    def replaced(self, run: Callable[[Tensor], Tensor], text: Tensor, end: int | None) -> Tensor:
        """Token ids (B, N), the id that ends a text (None: the highest in it) -> (B, D)."""
        states, feature = self.frozen(run, text)
        position = (text if end is None else (text == end).int()).argmax(dim=-1)
        real = torch.arange(text.shape[1], device=text.device) <= position[:, None]
        own: Any = self
        new: Tensor = self.side(states, feature, position, real, own.attn_mask)
        return new


class FeatureTextTower(FeatureText):
    """The text tower of open_clip's `CustomTextCLIP`."""

    def forward(self, text: Tensor) -> Tensor:
        """Token ids (B, N) -> (B, D)."""
        own: Any = self
        return self.replaced(super().forward, text, own.eos_id if own.pool_type == "eos" else None)


class FeatureEncodeText(FeatureText):
    """open_clip's `CLIP`, which is its own text tower."""

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """Token ids (B, N) -> (B, D)."""
        own: Any = self
        stock: Any = super()
        feature = self.replaced(stock.encode_text, text, own.text_eos_id if own.text_pool_type == "eos" else None)
        return F.normalize(feature, dim=-1) if normalize else feature


def feature_tower(tower: Tower) -> type[FeatureTower]:
    """The extension that suits a CLIP tower."""
    if tower.kind == "clip_vision":
        return FeatureVision
    return FeatureEncodeText if hasattr(tower.module, "encode_text") else FeatureTextTower


def feature_width(tower: Tower, output_dim: int | None, method: str) -> int:
    """D of a CLIP tower.

    Raises:
        ValueError: if output_dim is another, or if the tower pools otherwise than at the class token or the text's end.
    """
    module, where = tower.module, tower.name or "the model"
    vision = tower.kind == "clip_vision"
    pool = getattr(module, "pool_type", None) or getattr(module, "text_pool_type", None)
    odd = any(getattr(module, name, None) is not None for name in ("attn_pool", "cls_emb"))
    odd = odd or any(getattr(module, name, False) for name in ("output_tokens", "use_pad_mask"))
    if odd or pool not in (("tok",) if vision else ("argmax", "eos")):
        raise ValueError(
            f"{method} works on CLIP towers that put out the feature at the class token or at the end of the text; "
            f"{where} pools otherwise ({pool!r}), or puts out its tokens too"
        )
    projection = module.proj if vision else module.text_projection
    width = tower.width
    if projection is not None:
        width = projection.out_features if isinstance(projection, nn.Linear) else projection.shape[1]
    if output_dim not in (None, width):
        raise ValueError(
            f"{method} with output_dim={output_dim}: the feature of {where} has {width} channels; leave output_dim out"
        )
    return int(width)

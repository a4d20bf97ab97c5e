"""What trains without new parameters: everything, nothing but the head, or a part of the backbone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from adapters.towers import find_towers


@dataclass(frozen=True, kw_only=True)
class Full:
    """Full fine-tuning: every parameter of the backbone trains ("Full" in the paper's tables)."""

    name: ClassVar[str] = "full"
    not_mergeable: ClassVar[str] = ""

    def apply(self, model: nn.Module) -> None:
        model.requires_grad_(True)


@dataclass(frozen=True, kw_only=True)
class Linear:
    """A frozen backbone: only what `inject(..., train=...)` names trains ("Linear" in the paper's tables)."""

    name: ClassVar[str] = "linear"
    not_mergeable: ClassVar[str] = ""

    def apply(self, model: nn.Module) -> None:
        pass


# The norms that follow a tower's blocks, by its kind; those that a model does not have, or are identities, are passed.
LAST_NORMS = {
    "vit": ("norm", "fc_norm"),
    "swin": ("norm",),
    "convnext": ("norm_pre", "head.norm"),
    "clip_vision": ("ln_post",),
    "clip_text": ("ln_final",),
}


@dataclass(frozen=True, kw_only=True)
class Partial:
    """The backbone's own last linear map trains, and its last blocks if wanted ("Partially" in the paper's Table 1).

    With `blocks=0`, the paper's reading: CLIP's two projections (655,360 parameters in ViT-B/32). BERT has none of its
    own; there the retrieval head, which `inject(..., train=...)` names, is all that trains.

    Args:
        blocks: how many of each tower's last blocks train as well, with the norm that follows them (as the "Partial-k"
            of Jia et al., ECCV 2022, https://arxiv.org/abs/2203.12119). Default: 0.

    Raises:
        ValueError: for a negative number.
    """

    name: ClassVar[str] = "partial"
    not_mergeable: ClassVar[str] = ""
    blocks: int = 0

    def __post_init__(self) -> None:
        if self.blocks < 0:
            raise ValueError(f"partial needs blocks >= 0, but got {self.blocks}")

    def apply(self, model: nn.Module) -> None:
        for tower in find_towers(model, method=self.name):
            if self.blocks > len(tower.blocks):
                raise ValueError(
                    f"partial with blocks={self.blocks}: {tower.name or 'the model'} has {len(tower.blocks)}"
                )
            for block in tower.blocks[len(tower.blocks) - self.blocks :]:
                block.module.requires_grad_(True)
            if self.blocks:
                inside = dict(tower.module.named_modules())
                for norm in (inside[name] for name in LAST_NORMS.get(tower.kind, ()) if name in inside):
                    norm.requires_grad_(True)
            for name in ("proj", "text_projection"):
                projection = getattr(tower.module, name, None)
                if isinstance(projection, nn.Parameter | nn.Linear):
                    projection.requires_grad_(True)

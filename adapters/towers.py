"""The towers of a model and their blocks: what methods that work on blocks or hidden states, not on layers, go into.

| kind | found by | a block |
|---|---|---|
| bert | transformers' `encoder.layer` | attention, then feed-forward, each followed by add and norm |
| vit | timm's `blocks` beside a `patch_embed` | norm1, attn, norm2, mlp |
| swin | timm's `layers`, with windows | the same, on (B, H, W, C) |
| convnext | timm's `stages` | conv_dw, norm, mlp, on (B, C, H, W) |
| clip_vision, clip_text | open_clip's `transformer.resblocks` | ln_1, attn, ln_2, mlp |
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

KINDS = ("bert", "vit", "swin", "convnext", "clip_vision", "clip_text")


class Block(NamedTuple):
    """One residual block (of both sublayers) of a tower."""

    name: str
    module: Any
    width: int
    """Channels of the residual stream."""
    stage: int
    """0 in towers of one width."""


@dataclass(frozen=True)
class Tower:
    """One encoder.

    Attributes:
        name: its path in the model, "" if it is the model.
        kind: one of `KINDS`.
        module: the encoder with its embeddings and its last norm.
        blocks: in the order of the forward pass.
    """

    name: str
    kind: str
    module: Any
    blocks: tuple[Block, ...]

    @property
    def width(self) -> int:
        """Channels of the last block."""
        return self.blocks[-1].width

    def stages(self) -> list[list[Block]]:
        """The blocks by stage."""
        count = self.blocks[-1].stage + 1
        return [[block for block in self.blocks if block.stage == stage] for stage in range(count)]


def find_towers(model: nn.Module, kinds: tuple[str, ...] = KINDS, method: str = "this adapter") -> list[Tower]:
    """The towers of `model` in the order of its modules.

    Raises:
        ValueError: if there is none, or one that is not of `kinds`; the message names both.
    """
    towers = list(_towers(model))
    if not towers or (other := {tower.kind for tower in towers} - set(kinds)):
        found = ", ".join(sorted(other)) if towers else "none that is known"
        raise ValueError(
            f"{method} works on towers of kind {', '.join(kinds)}, but {type(model).__name__} holds {found}"
        )
    return towers


def _towers(model: nn.Module) -> Iterator[Tower]:
    for name, module in model.named_modules():
        at: Any = module
        prefix = f"{name}." if name else ""
        if isinstance(getattr(getattr(at, "encoder", None), "layer", None), nn.ModuleList):
            if hasattr(at, "embeddings") and hasattr(at.encoder.layer[0], "intermediate"):
                blocks = (
                    Block(f"{prefix}encoder.layer.{i}", block, block.output.dense.out_features, 0)
                    for i, block in enumerate(at.encoder.layer)
                )
                yield Tower(name, "bert", at, tuple(blocks))
        elif hasattr(at, "patch_embed") and hasattr(at, "blocks") and hasattr(at.blocks[0], "norm1"):
            blocks = (
                Block(f"{prefix}blocks.{i}", block, block.norm1.weight.shape[0], 0) for i, block in enumerate(at.blocks)
            )
            yield Tower(name, "vit", at, tuple(blocks))
        elif hasattr(at, "patch_embed") and hasattr(at, "layers") and hasattr(at.layers[0].blocks[0], "window_size"):
            yield Tower(name, "swin", at, tuple(_staged(prefix + "layers", at.layers)))
        elif hasattr(at, "stem") and hasattr(at, "stages") and hasattr(at.stages[0].blocks[0], "conv_dw"):
            yield Tower(name, "convnext", at, tuple(_staged(prefix + "stages", at.stages)))
        elif isinstance(getattr(getattr(at, "transformer", None), "resblocks", None), nn.ModuleList):
            kind = "clip_vision" if hasattr(at, "conv1") else "clip_text"
            blocks = (
                Block(f"{prefix}transformer.resblocks.{i}", block, block.ln_1.weight.shape[0], 0)
                for i, block in enumerate(at.transformer.resblocks)
            )
            yield Tower(name, kind, at, tuple(blocks))


def _staged(prefix: str, stages: Any) -> Iterator[Block]:
    for number, stage in enumerate(stages):
        for i, block in enumerate(stage.blocks):
            norm = getattr(block, "norm1", None) or block.norm
            yield Block(f"{prefix}.{number}.blocks.{i}", block, norm.weight.shape[0], number)

"""The towers of a model and their blocks: what methods that work on blocks or hidden states, not on layers, go into.

| kind | found by | a block |
|---|---|---|
| bert | transformers' `encoder.layer` | attention, then feed-forward, each followed by add and norm |
| vit | timm's `blocks`, also where they were cut from a model | norm1, attn, norm2, mlp |
| swin | timm's `layers`, with windows | the same, on (B, H, W, C) |
| convnext | timm's `stages` | conv_dw, norm, mlp, on (B, C, H, W) |
| clip_vision, clip_text | open_clip's `transformer.resblocks` | ln_1, attn, ln_2, mlp |
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

KINDS = ("bert", "vit", "swin", "convnext", "clip_vision", "clip_text")


class Block(NamedTuple):
    """One residual block (of both sublayers) of a tower."""

    name: str
    module: Any
    width: int
    """Channels of the residual stream."""
    stage: int
    """0 in towers of one width."""

    @property
    def like(self) -> Tensor:
        """The weight of a linear map or convolution: new parts are of its device and dtype. Norms may be of another."""
        return next(m.weight for m in self.module.modules() if isinstance(m, nn.Linear | nn.Conv2d))


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
    inside: tuple[str, ...] = ()  # of towers found so far: a stage of Swin looks like a ViT
    for name, module in model.named_modules():
        if not name.startswith(inside or ("\0",)) and (tower := _tower(name, module)) is not None:
            prefix = f"{name}." if name else ""
            # CLIP is its own text tower, and holds its vision tower.
            inside += (prefix + "transformer." if tower.kind.startswith("clip") else prefix,)
            yield tower


def _tower(name: str, module: nn.Module) -> Tower | None:
    """The tower that `module` is, found by its structure, or None."""
    at: Any = module
    prefix = f"{name}." if name else ""
    layer, resblocks = _inside(at, "encoder", "layer"), _inside(at, "transformer", "resblocks")
    if layer is not None and hasattr(at, "embeddings") and hasattr(layer[0], "intermediate"):
        blocks = [
            Block(f"{prefix}encoder.layer.{i}", block, block.output.dense.out_features, 0)
            for i, block in enumerate(layer)
        ]
        return Tower(name, "bert", at, tuple(blocks))
    if resblocks is not None:
        kind = "clip_vision" if hasattr(at, "conv1") else "clip_text"
        blocks = [
            Block(f"{prefix}transformer.resblocks.{i}", block, block.ln_1.weight.shape[0], 0)
            for i, block in enumerate(resblocks)
        ]
        return Tower(name, kind, at, tuple(blocks))
    for attribute, kind, sign in (("layers", "swin", "window_size"), ("stages", "convnext", "conv_dw")):
        stages = getattr(at, attribute, None)
        if isinstance(stages, nn.Sequential) and hasattr(_first(getattr(stages[0], "blocks", None)), sign):
            return Tower(name, kind, at, tuple(_staged(prefix + attribute, stages)))
    children: Any = getattr(at, "blocks", None)
    if hasattr(_first(children), "norm1") and hasattr(_first(children).attn, "qkv"):
        blocks = [
            Block(f"{prefix}blocks.{i}", block, block.norm1.weight.shape[0], 0)
            for i, block in children.named_children()
        ]
        return Tower(name, "vit", at, tuple(blocks))
    return None


def _inside(module: Any, first: str, second: str) -> Any:
    """A list of blocks at "first.second", or None."""
    found = getattr(getattr(module, first, None), second, None)
    return found if isinstance(found, nn.ModuleList) and len(found) else None


def _first(blocks: Any) -> Any:
    """The first of a container of blocks, or None."""
    return next(iter(blocks.children()), None) if isinstance(blocks, nn.Module) else None


def _staged(prefix: str, stages: Any) -> Iterator[Block]:
    for number, stage in enumerate(stages):
        for i, block in enumerate(stage.blocks):
            norm = getattr(block, "norm1", None) or block.norm
            yield Block(f"{prefix}.{number}.blocks.{i}", block, norm.weight.shape[0], number)

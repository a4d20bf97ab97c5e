"""DTL and DTL+: disentangled transfer learning (Fu, Zhu and Wu, AAAI 2024, https://arxiv.org/abs/2312.07856)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from adapters.base import Record, branch_tensors
from adapters.carry import CarryingBlock
from adapters.extend import extend
from adapters.lora import LoRABranch
from adapters.towers import Block, Tower, find_towers

BETA = 100.0  # of the gate; its published value in every setting
FIRST_ADD = {"vit": (1, 2), "swin": (7, 12)}  # as a part of the depth: block 6 of ViT-B's 12, 14 of Swin-B's 24
SIDE = "side"  # the role of a block's pair


@dataclass(frozen=True, kw_only=True)
class DTL:
    r"""A side network of low-rank pairs that feeds back into the later blocks of a frozen ViT or Swin.

    With x_l the input of block l, and H starting at zero (in Swin again at the start of each stage):

    .. math:: H \leftarrow H + x_l A_l^T B_l^T, \qquad
              x_{l+1} = \mathrm{block}_l(x_l) + H \, \sigma(\beta H) \;\text{ if } l \ge \text{start}

    without the last term in earlier blocks, :math:`\beta = 100`, no scale and no dropout. A starts uniform in
    +-1/sqrt(d), B at zero, so that the adapted model starts as the backbone. Blocks up to `start` see no trained value:
    they keep nothing for the backward pass, which is where the method saves memory.

    Every block of a ViT has a pair. In Swin those do whose stage has a block with an addition; in other stages a pair
    would reach nothing, since H does not outlive the stage. By default this gives the published layouts: ViT-B, pairs
    in all 12 blocks, additions after blocks 6 to 11; Swin-B, pairs in blocks 4 to 23, additions after blocks 14 to 23.

    DTL reads the mean of the patch tokens and normalises it then; it does not read the class token. The readout is up
    to the backbone: a timm ViT does so with ``global_pool="avg"``, where the pretrained `norm` has to serve as its
    `fc_norm`. Swin takes the mean of normalised tokens.

    A regularizer sees the pair of each block, role "side", before the gate: activations x A^T, basis B^T. H is a sum
    over blocks that then goes through the gate, and is no sum of rank-1 parts. The ReSoRA paper is silent on this;
    every token is a sample, the class token too.

    Args:
        rank: of each pair. Default: 2, as published for ViT-B; 4 for Swin-B.
        start: index of the first block, from 0 through all stages, after which H is added. Default: None, half of a
            ViT's depth and 7/12 of a Swin's.

    Raises:
        ValueError: for a rank below 1 or a negative start.
    """

    name: ClassVar[str] = "dtl"
    not_mergeable: ClassVar[str] = "its side network is nonlinear and runs across blocks"
    rank: int = 2
    start: int | None = None

    def __post_init__(self) -> None:
        if self.rank < 1 or (self.start is not None and self.start < 0):
            raise ValueError(
                f"{self.name} needs rank >= 1 and start >= 0 (or None), but got rank={self.rank}, start={self.start}"
            )

    def apply(self, model: nn.Module) -> None:
        for tower in find_towers(model, ("vit", "swin"), self.name):
            start, first = self._start(tower), 0
            for stage in tower.stages():
                adds = [first + i >= start for i in range(len(stage))]
                if any(adds):
                    self._put(tower, stage, adds)
                first += len(stage)

    def _start(self, tower: Tower) -> int:
        depth = len(tower.blocks)
        part, of = FIRST_ADD[tower.kind]
        start = depth * part // of if self.start is None else self.start
        if start >= depth:
            raise ValueError(f"{self.name} with start={start}: {tower.name or 'the model'} has blocks 0 to {depth - 1}")
        return start

    def _put(self, tower: Tower, stage: Sequence[Block], adds: Sequence[bool]) -> None:
        mix = self.mix(tower, stage[0])
        for block, add in zip(stage, adds, strict=True):
            pair = LoRABranch(block.width, block.width, self.rank, scale=1.0, dropout=0.0)
            like = block.like
            side = extend(block.module, SideBlock)
            side.branches, side.mix = nn.ModuleDict({SIDE: pair}), mix if add else None
            side.adds, side.last, side.record = add, block is stage[-1], None
            for new in (side.branches, side.mix):
                if new is not None:
                    new.to(device=like.device, dtype=like.dtype).train(side.training)

    def mix(self, tower: Tower, block: Block) -> nn.Module | None:
        """What the additions of a stage, of which `block` is one, go through after the gate."""
        return None

    def stored_subspaces(self, tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """See `LowRankAdapter`: activations = A^T (d, r), basis = B^T (r, d) of each block."""
        return {name: (pair["A"].T, pair["B"].T) for name, pair in branch_tensors(tensors).items()}


@dataclass(frozen=True, kw_only=True)
class DTLPlus(DTL):
    """`DTL` whose gated H goes through a depthwise convolution over the image before each addition.

    One convolution serves all additions of a ViT, and one each stage of a Swin: kernel k x k, stride 1, padding "same",
    no bias, PyTorch's own first values. Class and register tokens pass by it. The model still starts as the backbone,
    since H is zero. With k = 5 and rank 4, Swin-B has 128,512 parameters; the published code has 138,112, as it also
    makes convolutions for the first two stages, where nothing is added.

    Args:
        kernel: k. Default: 3; published by data set, 3 to 5 for ViT-B and 5 for Swin-B.
        rank, start: as in `DTL`.

    Raises:
        ValueError: for a kernel below 1, and as `DTL`. `inject` raises for a ViT whose patches have no fixed grid
            (`dynamic_img_size`): a block cannot tell how its tokens lie in the image.
    """

    name: ClassVar[str] = "dtl_plus"
    kernel: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kernel < 1:
            raise ValueError(f"{self.name} needs kernel >= 1, but got {self.kernel}")

    def mix(self, tower: Tower, block: Block) -> nn.Module:
        if tower.kind == "swin":
            return DepthwiseMix(block.width, self.kernel, 0, None)
        if getattr(tower.module, "dynamic_img_size", False):
            raise ValueError(
                f"{self.name} needs a fixed grid of patches: build {type(tower.module).__name__} with "
                "dynamic_img_size=False"
            )
        if not hasattr(tower.module, "patch_embed"):
            raise ValueError(
                f"{self.name} has to know how tokens lie in the image, but {type(tower.module).__name__} has no "
                "patch_embed with a grid_size; use dtl, or give it one"
            )
        rows, columns = tower.module.patch_embed.grid_size
        return DepthwiseMix(block.width, self.kernel, tower.module.num_prefix_tokens, (rows, columns))


class SideBlock(CarryingBlock):
    """A block with a pair of the side network; H is the carried stream.

    Attributes:
        branches: the pair, under the role "side".
        mix: what the gated H goes through before it is added, or None; all blocks of a stage hold the same module.
        adds: whether H is added to the block's output.
        record: see `adapters.base.Branched`.
    """

    added = ("branches", "mix", "adds", "record", *CarryingBlock.added)
    branches: nn.ModuleDict
    mix: nn.Module | None
    adds: bool
    record: Record | None

    def around(
        self, x: Tensor, carried: Tensor | None, block: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        pair = cast(LoRABranch, self.branches[SIDE])
        down, basis = pair.factors()
        activations = pair.activations(x.flatten(0, -2), down)
        if self.record is not None:
            self.record(SIDE, activations, basis, x.shape[:-1])
        update = (activations @ basis).view(x.shape)
        side = update if carried is None else carried + update
        x = block(x)
        if self.adds:
            gated = side * torch.sigmoid(BETA * side)
            x = x + (gated if self.mix is None else self.mix(gated))
        return x, side

    @property
    def roles(self) -> tuple[str, ...]:
        return (SIDE,)

    def weight_subspaces(self, role: str) -> tuple[Tensor, Tensor]:
        """activations A^T (d, r), basis B^T (r, d)."""
        pair = cast(LoRABranch, self.branches[role])
        return pair.A.T, pair.B.T


class DepthwiseMix(nn.Module):
    """A depthwise convolution over patches, for tokens (B, prefix + h w, C) or maps (B, h, w, C).

    Args:
        width: C.
        kernel: of the convolution.
        prefix: how many tokens come before the patches and pass unchanged.
        grid: h and w; None for maps.
    """

    def __init__(self, width: int, kernel: int, prefix: int, grid: tuple[int, int] | None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, kernel, padding="same", groups=width, bias=False)
        self.prefix, self.grid = prefix, grid

    def forward(self, x: Tensor) -> Tensor:
        if self.grid is None:
            return self._over_map(x)
        rows, columns = self.grid
        if x.shape[1] != self.prefix + rows * columns:
            raise ValueError(
                f"dtl_plus was made for {self.prefix} + {rows} x {columns} tokens, but got {x.shape[1]}: set the image "
                "size before `inject`, and use no patch dropout"
            )
        before, patches = x.split((self.prefix, rows * columns), dim=1)
        return torch.cat([before, self._over_map(patches.unflatten(1, self.grid)).flatten(1, 2)], dim=1)

    def _over_map(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x.permute(0, 3, 1, 2))
        return out.permute(0, 2, 3, 1)

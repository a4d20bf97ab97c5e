"""VPT: visual prompt tuning (Jia et al., ECCV 2022, https://arxiv.org/abs/2203.12119)."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapters.extend import Extension, extend
from adapters.towers import Block, Tower, find_towers


@dataclass(frozen=True, kw_only=True)
class VPT:
    """Trainable tokens beside the tokens of the input; the frozen blocks attend to them.

    The prompts stand after the class token and registers (CLIP's text tower: after the start token), without position
    embedding. Deep prompts are replaced by fresh ones before each block; shallow ones enter before the first block and
    pass through all. Either way they are gone after the last block, so that what reads the tokens out finds them where
    the backbone has them. Causal masks grow: a prompt is seen by what stands after it. In Swin, the prompts of a block
    pass its norm1 and join each window, with no position bias and no shift mask; their own outputs are dropped.

    Initialisation: uniform in +-v, v = sqrt(6 / (3 patch_height patch_width + d)), d the width of the block, as in the
    paper's code. A text tower has no patches, and the paper is silent: normal with deviation 0.02, as open_clip's own
    token embeddings. Counts at `prompts` p: ViT-B 9,216 p deep and 768 p shallow, Swin-B 12,032 p, CLIP ViT-B/32
    15,360 p.

    Args:
        prompts: their number, in each block if deep. Default: 10.
        deep: whether each block has prompts of its own. Default: True. Swin knows deep prompts only: shallow ones would
            have to be averaged over windows and go through the patch merging.
        dropout: probability of dropping a number of a prompt, for each sample on its own, in training. Default: 0.

    Raises:
        ValueError: for fewer than one prompt or a dropout outside [0, 1).
    """

    name: ClassVar[str] = "vpt"
    not_mergeable: ClassVar[str] = "its prompts are tokens that the blocks attend to, not weights"
    prompts: int = 10
    deep: bool = True
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.prompts < 1 or not 0 <= self.dropout < 1:
            raise ValueError(
                f"vpt needs prompts >= 1 and 0 <= dropout < 1, but got prompts={self.prompts}, dropout={self.dropout}"
            )

    def apply(self, model: nn.Module) -> None:
        towers = find_towers(model, ("vit", "swin", "clip_vision", "clip_text"), self.name)
        for tower in towers:
            self._check(tower)
        for tower in towers:
            for index, block in enumerate(tower.blocks):
                if tower.kind == "swin":
                    windowed = extend(block.module, PromptedWindowBlock)
                    windowed.prompts, windowed.dropout = self._fresh(tower, block), self.dropout
                    extend(block.module.attn, PromptedWindows).count = self.prompts
                else:
                    prompts = self._fresh(tower, block) if self.deep or index == 0 else None
                    start = tower.module.num_prefix_tokens if tower.kind == "vit" else 1
                    removes = self.deep or index == len(tower.blocks) - 1
                    add_prompts(block.module, prompts, self.prompts, start, removes, self.dropout)

    def _check(self, tower: Tower) -> None:
        block, path = tower.blocks[0].module, tower.name or "the model"
        if tower.kind == "swin":
            if not self.deep:
                raise ValueError(f"vpt with deep=False does not work on Swin ({path}): set deep=True")
            if not hasattr(block, "_attn") or not hasattr(block.attn, "_get_rel_pos_bias"):
                raise ValueError(f"vpt works on Swin with norms before attention, but {path} is a {_class(tower)}")
        elif tower.kind == "vit":
            check_vit(tower, self.name)

    def _fresh(self, tower: Tower, block: Block) -> nn.Parameter:
        """New prompts (p, d)."""
        like = block.like
        prompts = torch.empty(self.prompts, block.width, device=like.device, dtype=like.dtype)
        if tower.kind == "clip_text":
            return nn.Parameter(nn.init.normal_(prompts, std=0.02))
        patches = tower.module if tower.kind == "clip_vision" else tower.module.patch_embed
        bound = math.sqrt(6 / (3 * math.prod(patches.patch_size) + block.width))
        return nn.Parameter(nn.init.uniform_(prompts, -bound, bound))


_ARGUMENTS = {"x", "attn_mask", "is_causal"}  # of timm's plain ViT blocks; others take rotary or relative positions


def _class(tower: Tower) -> str:
    return type(tower.module).__name__


def check_vit(tower: Tower, method: str) -> None:
    """Raise ValueError, in the name of `method`, unless prompts can go among the tokens of this timm ViT's blocks."""
    takes = set(inspect.signature(tower.blocks[0].module.forward).parameters)
    if not hasattr(tower.module, "num_prefix_tokens") or not {"x", "attn_mask"} <= takes <= _ARGUMENTS:
        raise ValueError(
            f"{method} works on ViTs whose blocks know no positions (they take x, attn_mask, is_causal), but "
            f"{tower.name or 'the model'} is a {_class(tower)}, whose blocks take {', '.join(sorted(takes))}"
        )


def add_prompts(
    block: nn.Module, prompts: nn.Parameter | None, count: int, start: int, removes: bool, dropout: float
) -> None:
    """Put prompts among the tokens of a block, in place; the arguments are the attributes of `PromptedBlock`."""
    prompted = extend(block, PromptedBlock)
    prompted.prompts, prompted.count, prompted.start = prompts, count, start
    prompted.removes, prompted.dropout = removes, dropout


class PromptedBlock(Extension):
    """A block of a ViT or of CLIP with prompts among its tokens.

    A deep block takes its prompts out again: the next would overwrite them, and so the tokens between blocks are the
    backbone's own, for whoever reads hidden states.

    Attributes:
        prompts: (p, d) to put in; None in the later blocks of shallow prompting.
        count: p.
        start: the position before which they stand.
        removes: whether they are taken out of the block's output.
        dropout: probability.
    """

    added = ("prompts", "count", "start", "removes", "dropout")
    prompts: nn.Parameter | None
    count: int
    start: int
    removes: bool
    dropout: float

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x (B, L, d), with the p prompts where they are there already -> the same, with them unless they end here."""
        start, end = self.start, self.start + self.count
        if self.prompts is not None:
            prompts = _for_batch(self.prompts, x, self.dropout, self.training)
            x = torch.cat([x[:, :start], prompts, x[:, start:]], dim=1)
        # open_clip under gradient checkpointing passes (x, None, None, mask), also to blocks that take (x, mask).
        masks = [mask for mask in (*args, kwargs.pop("attn_mask", None)) if mask is not None]
        if masks:
            kwargs["attn_mask"] = grown(masks[0], start, self.count)
        x = super().forward(x, **kwargs)
        return torch.cat([x[:, :start], x[:, end:]], dim=1) if self.removes else x


class PromptedWindowBlock(Extension):
    """A Swin block: its prompts (p, d) pass norm1 and go to its attention."""

    added = ("prompts", "dropout")
    prompts: nn.Parameter
    dropout: float

    def _attn(self, x: Tensor) -> Tensor:
        """x (B, H, W, d), normed -> the same shape: timm's shift, windows and mask around attention with prompts."""
        own: Any = self
        prompts = own.norm1(_for_batch(self.prompts, x, self.dropout, self.training))
        stock: Any = self.stock_class
        out: Tensor = stock._attn(_WithAttention(own, partial(own.attn, prompts=prompts)), x)
        return out


class _WithAttention:
    """A block as its own methods see it, with another `attn`: the way to hand on prompts that keeps no state."""

    def __init__(self, block: Any, attn: Any) -> None:
        self.block, self.attn = block, attn

    def __getattr__(self, name: str) -> Any:
        return getattr(self.block, name)


class PromptedWindows(Extension):
    """Swin's window attention with `count` more tokens in each window."""

    added = ("count",)
    count: int

    def forward(self, x: Tensor, mask: Tensor | None = None, *, prompts: Tensor) -> Tensor:
        """x (B nW, N, d) sample by sample, mask (nW, N, N), prompts (B, p, d) -> (B nW, N, d)."""
        in_windows = prompts.to(x.dtype).repeat_interleave(len(x) // len(prompts), dim=0)
        mask = None if mask is None else self._padded(mask)
        return super().forward(torch.cat([x, in_windows], dim=1), mask)[:, : x.shape[1]]

    def _get_rel_pos_bias(self) -> Tensor:
        stock: Any = super()
        return self._padded(stock._get_rel_pos_bias())

    def _padded(self, added: Tensor) -> Tensor:
        """What is added to the logits, (..., N, N) -> (..., N + p, N + p): nothing at the prompts."""
        return F.pad(added, (0, self.count, 0, self.count))


def _for_batch(prompts: Tensor, x: Tensor, dropout: float, training: bool) -> Tensor:
    """(p, d) -> (B, p, d), each sample with its own dropout."""
    return F.dropout(prompts.to(x.dtype).expand(len(x), -1, -1), dropout, training)


def grown(mask: Tensor, start: int, count: int) -> Tensor:
    """An attention mask with `count` more positions before `start`.

    What stands after a prompt sees it. What stands before it does if the mask is not causal, that is, if the last token
    before the prompts sees the one behind it. A prompt sees the tokens that this last token sees.

    Args:
        mask: (..., L, L), added to the logits, or boolean with True where attention is allowed.
        start: the position that the first new one takes; at 0, the first token stands in for the last before.
        count: p.

    Returns:
        (..., L + p, L + p).
    """
    length, device = mask.shape[-1], mask.device
    last = max(start - 1, 0)
    mask = mask.expand(*mask.shape[:-2], length, length)
    positions = torch.arange(length + count, device=device)
    sources = torch.where(positions < start, positions, (positions - count).clamp(min=start))
    sources = sources.masked_fill((positions >= start) & (positions < start + count), last)
    visible = mask.new_full((), 1 if mask.dtype == torch.bool else 0)
    ahead = mask[..., last, last + 1, None, None]
    columns = torch.where(positions[:, None] < positions[start : start + count], ahead, visible)
    columns = columns.expand(*mask.shape[:-2], -1, -1)
    rows = mask[..., sources, :]
    return torch.cat([rows[..., :start], columns, rows[..., start:]], dim=-1)

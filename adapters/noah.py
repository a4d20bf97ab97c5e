"""NOAH: what neural prompt search finds and then trains (Zhang et al., 2022, https://arxiv.org/abs/2206.04673)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from adapters.base import branch_tensors
from adapters.bottleneck import Bottleneck, part_of
from adapters.extend import extend
from adapters.houlsby import Followed
from adapters.lora import LoRABranch
from adapters.targets import adapt, find_sites
from adapters.towers import Tower, find_towers
from adapters.vpt import add_prompts, check_vit

NUMBERS = ("prompts", "rank", "bottleneck")


@dataclass(frozen=True, kw_only=True)
class NOAH:
    r"""In each block of a ViT: p prompts, a LoRA of rank r on the fused qkv, and a bottleneck of a channels.

    With :math:`[x, P]` the tokens and the block's own prompts, which are gone after the block,

    .. math:: x_1 = [x, P] + attn(LN [x, P]), \quad m = mlp(LN x_1), \quad out = x_1 + m + up(f(down\,m))

    where attn computes q, k and v with the weight :math:`W + BA`: one pair A (r, d), B (3 d, r) for all three, without
    a scale. f is the quick GELU, :math:`f(z) = z\,\sigma(1.702 z)`; the bottleneck stands behind layer scale and
    stochastic depth. A block of width 768 trains 768 p + 3,072 r parameters, and 1,537 a + 768 where a > 0.

    The numbers are given. NOAH finds them, for each data set, with a supernet and an evolutionary search, neither of
    which is here, and then trains that network from fresh values: this adapter. The 19 networks that its authors
    released for VTAB-1K (scripts/conf/table2/noah.yaml has them) have 1, 5 or 10 of each in every block, and
    360,134 parameters on average; the ReSoRA paper's Table 2 prints 0.43 M.

    Initialisation, as the published modules declare it: A uniform in +-1/sqrt(d), B zero; W_down and W_up Xavier
    uniform, their biases N(0, 1e-6^2); prompts Xavier uniform as a tensor (1, p, d), that is, in +-sqrt(6/(d (p + 1))).
    So the adapted model does not start as the backbone. What the published code runs differs: it draws the tensors at
    the width of its supernet and keeps the first p, r and a, and it then gives every linear layer, B among them, a
    truncated normal of deviation 0.02. It also has prompts with positions before the first block, which replaces them
    before anything reads them; they are not here. Its prompts stand at the end of the sequence, ours behind the class
    token: the same to blocks that know no positions.

    Args:
        prompts: p, a number for all blocks, or a sequence with one for each block; 0: none there. Default: 5, the
            middle of what NOAH chooses from.
        rank: r, likewise.
        bottleneck: a, likewise.
        dropout: probability of dropping, in training, a number of a prompt (for each sample on its own), an input of
            LoRA, a value of the bottleneck. Default: 0.1.

    Raises:
        ValueError: for numbers below 0, for nothing but zeros, or a dropout outside [0, 1). `apply` raises it where a
            sequence is not as long as the tower.
    """

    name: ClassVar[str] = "noah"
    not_mergeable: ClassVar[str] = "its prompts are tokens and its bottlenecks nonlinear; LoRA alone lies in weights"
    prompts: int | Sequence[int] = 5
    rank: int | Sequence[int] = 5
    bottleneck: int | Sequence[int] = 5
    dropout: float = 0.1

    def __post_init__(self) -> None:
        numbers: list[Any] = []
        for name in NUMBERS:
            given = getattr(self, name)
            object.__setattr__(self, name, tuple(given) if isinstance(given, Sequence) else given)
            numbers += given if isinstance(given, Sequence) else [given]
        if not all(isinstance(n, int) and n >= 0 for n in numbers) or not any(numbers) or not 0 <= self.dropout < 1:
            raise ValueError(
                f"{self.name} needs {', '.join(NUMBERS)} >= 0, each a number or a sequence with one a block, not "
                f"all 0, and 0 <= dropout < 1, but got {self}"
            )

    def apply(self, model: nn.Module) -> None:
        towers = find_towers(model, ("vit",), self.name)
        for tower in towers:
            check_vit(tower, self.name)
        qkv = {site.name: site for site in find_sites(model, ("q",))}  # the first rows of each fused map
        planned = []
        for tower in towers:
            numbers = [self._by_block(name, tower) for name in NUMBERS]
            sites = [qkv[f"{block.name}.attn.qkv"] for block in tower.blocks]
            ends = [part_of(block, "drop_path2", self.name) for block in tower.blocks]
            start: int = tower.module.num_prefix_tokens
            planned += [(start, *each) for each in zip(tower.blocks, sites, ends, *numbers, strict=True)]
        for start, block, site, end, p, r, a in planned:
            if p:
                add_prompts(block.module, _prompts(p, block.width, site.weight), p, start, True, self.dropout)
            if r:
                rows = len(site.weight)
                adapt(site, LoRABranch(site.d_in, rows, r, 1.0, self.dropout), "qkv", (0, rows))
            if a:
                extend(end, Followed).hold(_bottleneck(block.width, a, self.dropout, site.weight))

    def _by_block(self, name: str, tower: Tower) -> Sequence[int]:
        """One number for each block of a tower."""
        numbers: int | Sequence[int] = getattr(self, name)
        if isinstance(numbers, int):
            return (numbers,) * len(tower.blocks)
        if len(numbers) != len(tower.blocks):
            raise ValueError(
                f"{self.name} with {name}={numbers} has {len(numbers)} numbers, but {tower.name or 'the model'} has "
                f"{len(tower.blocks)} blocks: give each block one, or one number for all"
            )
        return numbers

    def stored_subspaces(self, tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """See `LowRankAdapter`: LoRA's A^T (d, r), B^T (r, 3 d), and a bottleneck's W_down^T (d, a), W_up^T (a, d)."""
        factors = {"qkv": ("A", "B"), "bottleneck": ("down.weight", "up.weight")}
        found = {}
        for name, part in branch_tensors(tensors).items():
            down, up = factors[name.rpartition(".")[2]]
            found[name] = part[down].T, part[up].T
        return found


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _prompts(count: int, width: int, like: Tensor) -> nn.Parameter:
    """New prompts (p, d), on the device and in the dtype of `like`."""
    prompts = torch.empty(1, count, width, device=like.device, dtype=like.dtype)
    return nn.Parameter(nn.init.xavier_uniform_(prompts)[0])


def _bottleneck(width: int, size: int, dropout: float, like: Tensor) -> Bottleneck:
    made = Bottleneck(width, size, quick_gelu, 1.0, dropout, like)
    for layer in (made.down, made.up):
        nn.init.xavier_uniform_(layer.weight)
        nn.init.normal_(layer.bias, std=1e-6)
    return made

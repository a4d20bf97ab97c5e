"""LoRA: low-rank adaptation (Hu et al., ICLR 2022, https://arxiv.org/abs/2106.09685)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from adapters.base import Branch, branch_tensors, stored_pair
from adapters.targets import adapt, check_targets, compiled, find_sites, rank_of


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """The settings that LoRA and its relatives share.

    Args:
        rank: number of rank-1 subspaces r. Default: 8, as in the paper.
        alpha: the update is scaled by alpha / rank. Default: 8; the paper is silent.
        targets: semantic targets, or a regular expression (see `adapters.targets`). Default: q and v, as for BERT in
            the paper's Table 1.
        dropout: probability of dropping an input of the branch in training. Default: 0.
        rank_pattern: other ranks for some layers: regular expression -> rank; the first that is found in
            "<layer>.<role>" counts, such as ``{"visual": 4}`` for one tower of CLIP.

    Raises:
        ValueError: for a rank below 1, an alpha that is not positive, a dropout outside [0, 1) or unknown targets.
    """

    name: ClassVar[str]
    not_mergeable: ClassVar[str] = ""
    rank: int = 8
    alpha: float = 8.0
    targets: str | tuple[str, ...] = ("q", "v")
    dropout: float = 0.0
    rank_pattern: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", self.targets if isinstance(self.targets, str) else tuple(self.targets))
        object.__setattr__(self, "rank_pattern", dict(self.rank_pattern))
        check_targets(self.targets)
        ranks = [self.rank, *self.rank_pattern.values()]
        if min(ranks) < 1 or self.alpha <= 0 or not 0 <= self.dropout < 1:
            raise ValueError(
                f"{type(self).__name__} needs rank >= 1, alpha > 0 and 0 <= dropout < 1, "
                f"but got rank={', '.join(map(str, ranks))}, alpha={self.alpha}, dropout={self.dropout}"
            )
        for pattern in self.rank_pattern:
            compiled(pattern)

    def branch(self, d_in: int, d_out: int, rank: int) -> Branch:
        """The trainable part of one target. Of its parameters A is (r, d_in) and B (d_out, r): `stored_subspaces`."""
        raise NotImplementedError

    def apply(self, model: nn.Module) -> None:
        sites = find_sites(model, self.targets)
        if unused := [p for p in self.rank_pattern if not any(compiled(p).search(site.key) for site in sites)]:
            raise ValueError(f"rank_pattern {unused[0]!r} is found in none of the targets, such as {sites[0].key}")
        for site in sites:
            adapt(site, self.branch(site.d_in, site.d_out, rank_of(site, self.rank, self.rank_pattern)))

    def stored_subspaces(self, tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """See `LowRankAdapter`."""

        def pair(part: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            (rank, d_in), d_out = part["A"].shape, len(part["B"])
            return stored_pair(lambda: self.branch(d_in, d_out, rank), part)

        return {name: pair(part) for name, part in branch_tensors(tensors).items()}


@dataclass(frozen=True, kw_only=True)
class LoRA(LowRank):
    r"""Add a trainable low-rank update to linear layers: :math:`Y = X W^T + \frac{\alpha}{r} X A^T B^T`.

    Each of q, k and v has its own A and B, also where the backbone computes them in one fused layer (the reading that
    gives the 0.44 M parameters of the ReSoRA paper's Table 2). A starts uniform in +-1/sqrt(d_in), B at zero, so that
    the adapted model starts as the backbone. The settings are those of `LowRank`.
    """

    name: ClassVar[str] = "lora"

    def branch(self, d_in: int, d_out: int, rank: int) -> Branch:
        return LoRABranch(d_in, d_out, rank, self.alpha / rank, self.dropout)


class LoRABranch(Branch):
    """The update of one target: A (r, d_in), B (d_out, r)."""

    def __init__(self, d_in: int, d_out: int, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(rank, d_in))
        self.B = nn.Parameter(torch.zeros(d_out, rank))
        self.scale, self.dropout = scale, dropout
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def factors(self) -> tuple[Tensor, Tensor]:
        """down (r, d_in) = scale A, basis (r, d_out) = B^T."""
        return self.A if self.scale == 1 else self.A * self.scale, self.B.T

"""LoRA: low-rank adaptation (Hu et al., ICLR 2022, https://arxiv.org/abs/2106.09685)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapters.base import adapt, branch_tensors
from adapters.targets import check_targets, find_sites


@dataclass(frozen=True, kw_only=True)
class LoRA:
    r"""Add a trainable low-rank update to linear layers: :math:`Y = X W^T + \frac{\alpha}{r} X A^T B^T`.

    Each of q, k and v has its own A and B, also where the backbone computes them in one fused layer (the reading that
    gives the 0.44 M parameters of the ReSoRA paper's Table 2). A starts uniform in +-1/sqrt(d_in), B at zero, so that
    the adapted model starts as the backbone.

    Args:
        rank: number of rank-1 subspaces r. Default: 8, as in the paper.
        alpha: the update is scaled by alpha / rank. Default: 8; the paper is silent.
        targets: semantic targets. Default: q and v, as for BERT in the paper's Table 1.
        dropout: probability of dropping an input of the branch in training. Default: 0.

    Raises:
        ValueError: for a rank below 1, an alpha that is not positive, a dropout outside [0, 1) or unknown targets.
    """

    name: ClassVar[str] = "lora"
    rank: int = 8
    alpha: float = 8.0
    targets: tuple[str, ...] = ("q", "v")
    dropout: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", self.targets if isinstance(self.targets, str) else tuple(self.targets))
        check_targets(self.targets)
        if self.rank < 1 or self.alpha <= 0 or not 0 <= self.dropout < 1:
            raise ValueError(
                "LoRA needs rank >= 1, alpha > 0 and 0 <= dropout < 1, "
                f"but got rank={self.rank}, alpha={self.alpha}, dropout={self.dropout}"
            )

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def apply(self, model: nn.Module) -> None:
        for _, layer, role, start, stop in find_sites(model, self.targets):
            branch = LoRABranch(layer.in_features, stop - start, self.rank, self.scale, self.dropout)
            adapt(layer, role, (start, stop), branch.to(device=layer.weight.device, dtype=layer.weight.dtype))

    def stored_subspaces(self, tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """See `LowRankAdapter`: activations = scale A^T (d_in, r), basis = B^T (r, d_out)."""
        return {name: (part["A"].T * self.scale, part["B"].T) for name, part in branch_tensors(tensors).items()}


class LoRABranch(nn.Module):
    """The update of one target: A (r, d_in), B (d_out, r)."""

    def __init__(self, d_in: int, d_out: int, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(rank, d_in))
        self.B = nn.Parameter(torch.zeros(d_out, rank))
        self.scale, self.dropout = scale, dropout
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def subspaces(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (N, d_in) -> activations (N, r) = scale x A^T, basis (r, d_out) = B^T."""
        return F.linear(F.dropout(x, self.dropout, self.training), self.A) * self.scale, self.B.T

"""AdaLoRA: low-rank updates that share a budget of ranks (Zhang et al., ICLR 2023, https://arxiv.org/abs/2303.10512)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from adapters.base import Branch
from adapters.lora import LowRank

EPSILON = 1e-5  # PEFT divides by rank + this


@dataclass(frozen=True, kw_only=True)
class AdaLoRA(LowRank):
    r"""Low-rank updates in the form of an SVD, which are pruned while they train.

    .. math:: Y = X W^T + \frac{\alpha}{r} X A^T \mathrm{diag}(E) B^T

    A (r, d_in) and B (d_out, r), the paper's Q and P, start from N(0, 0.02^2), the singular values E (r,) at zero, so
    that the adapted model starts as the backbone; the scale is PEFT's, alpha / (r + 1e-5).

    `rank` is the initial rank. While it trains, the least important singular values of all layers together are set to
    zero, until `target_rank` are left in a layer on average: `after_step`. No tensor shrinks: all shapes and the number
    of parameters stay, 442,656 at r = 8 on q, k and v of ViT-B/16 (0.44 M in Table 2 of the ReSoRA paper). A pruned
    rank stays a subspace whose activations are zero. Its pairs count zero in Eq. 6, Eq. 7, the overlap and the mean
    redundancy; Eq. 5 is a function of distances, in which it is a subspace at the origin.

    `training.ReSoRAMixin` adds the penalty to the loss and prunes; a loop without it has to call
    `adapters.loss_parts` and `adapters.after_step`. Importance is that of the gradients which the optimiser gets: with
    the penalties in, clipped. Its statistics are saved with the adapter, so that a resumed run is exact; the file is
    three times as large as LoRA's.

    Args:
        rank: the initial rank r; alpha, targets, dropout and rank_pattern as in `LowRank`.
        target_rank: mean rank that is left in the end. Default: None, two thirds of the initial one (the paper's
            initial budget is 1.5 times the final one).
        initial_warmup: share of the steps before anything is pruned. Default: 0.1.
        final_tuning: share of the steps, at the end, in which the ranks that are left stay. Default: 0.5. The paper
            sets both in steps for each data set: about 0.12 and 0.44 of all on SST-2. PEFT's defaults are 0.
        interval: steps from one pruning to the next. Default: 1; the paper takes 1 to 100.
        betas: decay of the running means of sensitivity and uncertainty. Default: 0.85 each, as in the paper.
        orthogonality: weight of the penalty that keeps A and B orthogonal, see `loss_parts`. Default: 0.5, as in PEFT;
            the paper takes 0.1 to 0.5.

    Raises:
        ValueError: as `LowRank`; for a target_rank above all ranks, shares that leave no step to prune in, an interval
            below 1, betas outside (0, 1) or a negative weight.
    """

    name: ClassVar[str] = "adalora"
    target_rank: int | None = None
    initial_warmup: float = 0.1
    final_tuning: float = 0.5
    interval: int = 1
    betas: tuple[float, float] = (0.85, 0.85)
    orthogonality: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "betas", tuple(self.betas))
        highest = max([self.rank, *self.rank_pattern.values()])
        if self.target_rank is not None and not 1 <= self.target_rank <= highest:
            raise ValueError(f"AdaLoRA needs 1 <= target_rank <= rank, but got {self.target_rank} and {highest}")
        if min(self.initial_warmup, self.final_tuning) < 0 or self.initial_warmup + self.final_tuning >= 1:
            raise ValueError(
                "AdaLoRA needs initial_warmup >= 0 and final_tuning >= 0, shares of the steps with a sum below 1, "
                f"but got {self.initial_warmup} and {self.final_tuning}"
            )
        if self.interval < 1 or self.orthogonality < 0:
            raise ValueError(
                f"AdaLoRA needs interval >= 1 and orthogonality >= 0, but got {self.interval} and {self.orthogonality}"
            )
        if len(self.betas) != 2 or not all(0 < beta < 1 for beta in self.betas):
            raise ValueError(f"AdaLoRA needs two betas between 0 and 1, but got {self.betas}")

    def branch(self, d_in: int, d_out: int, rank: int) -> Branch:
        return AdaLoRABranch(d_in, d_out, rank, self.alpha / (rank + EPSILON), self.dropout)

    def loss_parts(self, model: nn.Module) -> dict[str, Tensor]:
        """See `PenalizedAdapter`: the weighted orthogonality of every A and B."""
        if not self.orthogonality:
            return {}
        factors = [factor for branch in _branches(model) for factor in (branch.A, branch.B.T)]
        return {"adalora_orthogonality": self.orthogonality * orthogonality(factors)}

    @torch.no_grad()
    def after_step(self, model: nn.Module, step: int, total_steps: int) -> None:
        """See `ScheduledAdapter`: update the importance of each rank, and prune to the budget of this step.

        The budget is all ranks until the initial warm-up ends, falls with the cube of the remaining time, and has its
        target when the final tuning begins. In between, a pruned singular value trains on and may come back.
        """
        branches = _branches(model)
        start, end = round(self.initial_warmup * total_steps), total_steps - int(self.final_tuning * total_steps)
        if step < end:
            update_importance(branches, self.betas)
        if step > end:
            for branch in branches:
                branch.prune()
        elif step == end or (step > start and step % self.interval == 0):
            initial = sum(len(branch.E) for branch in branches)
            target = round(initial / 1.5) if self.target_rank is None else self.target_rank * len(branches)
            allocate(branches, budget(step, start, end, initial, min(initial, target)))


class AdaLoRABranch(Branch):
    """The update of one target: A (r, d_in), E (r,), B (d_out, r).

    Buffers: of each factor the running means "A_sensitivity" and "A_uncertainty", in its shape, and `alive` (r,), which
    ranks the last pruning left.
    """

    alive: Tensor

    def __init__(self, d_in: int, d_out: int, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(rank, d_in))
        self.E = nn.Parameter(torch.zeros(rank))
        self.B = nn.Parameter(torch.empty(d_out, rank))
        self.scale, self.dropout = scale, dropout
        nn.init.normal_(self.A, std=0.02)
        nn.init.normal_(self.B, std=0.02)
        for name, factor in list(self.named_parameters()):
            self.register_buffer(f"{name}_sensitivity", torch.zeros_like(factor))
            self.register_buffer(f"{name}_uncertainty", torch.zeros_like(factor))
        self.register_buffer("alive", torch.ones(rank, dtype=torch.bool))

    def factors(self) -> tuple[Tensor, Tensor]:
        """down (r, d_in) = scale diag(E) A, zero where pruned; basis (r, d_out) = B^T."""
        return self.A * (self.E * self.scale)[:, None], self.B.T

    def scores(self) -> Tensor:
        """The importance (r,) of each rank: sensitivity times uncertainty, of E plus the means over A and B."""
        a, e, b = (
            self.get_buffer(f"{name}_sensitivity").float() * self.get_buffer(f"{name}_uncertainty").float()
            for name in "AEB"
        )
        return a.mean(dim=1) + e + b.mean(dim=0)

    def prune(self) -> None:
        """Set the singular values of the ranks that are not alive to zero."""
        self.E.masked_fill_(~self.alive, 0.0)


def orthogonality(factors: Sequence[Tensor]) -> Tensor:
    r"""Factors F (r, d) -> the mean over them of :math:`\|F F^T - I\|_F`, in float32.

    The paper's Eq. 4 squares the norm and sums over the matrices; PEFT and this do neither.
    """
    by_shape: dict[torch.Size, list[Tensor]] = {}
    for factor in factors:
        by_shape.setdefault(factor.shape, []).append(factor)
    norms = []
    with torch.autocast(factors[0].device.type, enabled=False):
        for same in by_shape.values():
            rows = torch.stack(same)
            rows = rows if rows.dtype == torch.float64 else rows.float()
            eye = torch.eye(rows.shape[1], device=rows.device, dtype=rows.dtype)
            norms.append(torch.linalg.matrix_norm(rows @ rows.mT - eye))
    return torch.cat(norms).mean()


def budget(step: int, start: int, end: int, initial: int, target: int) -> int:
    """How many ranks all layers together have after `step`, between `start` (initial) and `end` (target)."""
    left = 0.0 if step >= end else 1 - (step - start) / (end - start)
    return int((initial - target) * left**3 + target)


def update_importance(branches: Sequence[AdaLoRABranch], betas: tuple[float, float]) -> None:
    """Take |w dL/dw| of every parameter into the running means: sensitivity, and its mean absolute deviation.

    A step in which any of them is not finite leaves both as they were: a `GradScaler` skips it, and a mean would never
    forget it.
    """
    named = [(branch, name, p) for branch in branches for name, p in branch.named_parameters() if p.grad is not None]
    sensitivity = [branch.get_buffer(f"{name}_sensitivity") for branch, name, _ in named]
    uncertainty = [branch.get_buffer(f"{name}_uncertainty") for branch, name, _ in named]
    gradients = [p.grad for _, _, p in named if p.grad is not None]
    importance = list(torch._foreach_mul([p for _, _, p in named], gradients))
    torch._foreach_abs_(importance)
    finite = torch.stack(torch._foreach_norm(importance, math.inf)).isfinite().all()  # stays on the device
    counted = [new.where(finite, mean) for new, mean in zip(importance, sensitivity, strict=True)]
    torch._foreach_lerp_(sensitivity, counted, 1 - betas[0])
    torch._foreach_sub_(importance, sensitivity)
    torch._foreach_abs_(importance)
    counted = [new.where(finite, mean) for new, mean in zip(importance, uncertainty, strict=True)]
    torch._foreach_lerp_(uncertainty, counted, 1 - betas[1])


def allocate(branches: Sequence[AdaLoRABranch], ranks: int) -> None:
    """Keep the most important ranks of all branches together, and prune the others.

    Among equal scores the first ones are kept, so that exactly `ranks` are left; PEFT prunes all of them.
    """
    scores = torch.cat([branch.scores() for branch in branches])
    alive = torch.zeros_like(scores, dtype=torch.bool)
    alive[scores.argsort(descending=True, stable=True)[:ranks]] = True
    for branch, of_branch in zip(branches, alive.split([len(branch.E) for branch in branches]), strict=True):
        branch.alive.copy_(of_branch)
        branch.prune()


def _branches(model: nn.Module) -> list[AdaLoRABranch]:
    return [module for module in model.modules() if isinstance(module, AdaLoRABranch)]

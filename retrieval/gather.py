"""Rows of all processes, with the gradients that one process with the whole batch would have.

A loss over its own rows against everybody's columns, averaged over the processes by DistributedDataParallel, has the
gradients of the same loss in one process with all rows, if the backward pass of the gathering *sums* over the
processes: each row stands in the columns of all their losses. (CLIP4Clip's own code returns the local slice instead,
which divides the gradients of the embeddings by the number of processes; what is averaged beside them, a penalty, then
has that many times its weight.)
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def processes() -> int:
    """How many there are; 1 where torch.distributed is not in use."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if processes() > 1 else 0


def gather(x: Tensor) -> Tensor:
    """x (B, ...), of the same shape in each process -> (B times processes, ...), in order of rank.

    With one process x itself. Every process has to call it, and, where gradients are taken, to use the result in what
    it derives: the backward pass is a sum over the processes, too.
    """
    if processes() == 1:
        return x
    # A process without a single readable clip has embeddings that no parameter led to; it must take part in the sum.
    anchor = torch.zeros((), requires_grad=x.is_floating_point())
    gathered: Tensor = _Gather.apply(x, anchor)
    return gathered


@cache
def _group(world: Any) -> Any:
    """A group of all processes for this module alone.

    DistributedDataParallel reduces gradients when they are ready, which is at another time in a process that lacks a
    part of the graph; in one group with ours its sums would then meet the wrong partner.
    """
    return dist.new_group()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor) -> Tensor:
        ctx.rows = len(x)
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(processes())]
        dist.all_gather(parts, x.contiguous(), group=_group(dist.group.WORLD))
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient, group=_group(dist.group.WORLD))
        return gradient.narrow(0, rank() * ctx.rows, ctx.rows), None

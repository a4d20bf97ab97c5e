"""Reentrant gradient checkpointing: a layer runs without a graph, and again, with one, in the backward pass.

A penalty on the activations of the first pass leaves its gradient on them, which are leaves; in the second pass it is
added to the gradient of the same activations. Autograd runs what was computed last first, so that the penalty's
gradient is there by then.
"""

from __future__ import annotations

import sys
import weakref

import torch
from torch import Tensor
from torch.utils.module_tracker import ModuleTracker

AUTOGRAD = ModuleTracker()  # only asked whether a backward pass is running, `is_bw`; it tracks nothing unless entered
FORWARD = "CheckpointFunction.forward"  # as torch, DeepSpeed and Megatron call it


def in_reentrant_checkpoint() -> bool:
    """Whether this forward pass, which has no graph, will be repeated: the first pass of a reentrant checkpoint.

    The grad mode is off inside as it is under the caller's own `no_grad`, so it is the stack that tells them apart.
    """
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code.co_qualname == FORWARD:
            return True
    return False


class Replay:
    """The activations of a first pass, until the second one comes."""

    def __init__(self, activations: Tensor) -> None:
        self.first = weakref.ref(activations)  # nothing is held for a backward pass that never comes

    @property
    def gone(self) -> bool:
        """Whether the penalty's graph is, so that there is nothing to add any more."""
        return self.first() is None

    @staticmethod
    def now() -> bool:
        """Whether this forward pass may be the second one; that of a later step must not be taken for it."""
        return torch.is_grad_enabled() and bool(AUTOGRAD.is_bw)

    def add_to(self, activations: Tensor) -> None:
        """Add the penalty's gradient to that of `activations`, those of the second pass."""
        if (first := self.first()) is not None and activations.requires_grad:
            activations.register_hook(
                lambda gradient: gradient if first.grad is None else gradient + first.grad.view_as(gradient)
            )

"""How the learning rate changes: a schedule gives the share of the peak rate at each step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.optim.lr_scheduler import LambdaLR


@dataclass(frozen=True, kw_only=True)
class Span:
    """What a schedule spans: a stage, or all of them under one schedule.

    Attributes:
        steps: of the optimiser, in all.
        warmup: share of them with a rising rate.
        steps_per_epoch: of them.
    """

    steps: int
    warmup: float
    steps_per_epoch: int

    @property
    def warmup_steps(self) -> int:
        """Rounded up."""
        return math.ceil(self.steps * self.warmup)

    def rising(self, step: int) -> float:
        """The share in a linear warm-up, which stays at 1."""
        return min(1.0, step / self.warmup_steps) if self.warmup_steps else 1.0


class Schedule(Protocol):
    """A frozen dataclass of its settings."""

    def share(self, step: int, span: Span) -> float:
        """Of the peak learning rate at step number `step`, from 0."""
        ...


@dataclass(frozen=True)
class Cosine:
    """A linear warm-up from zero, then half a cosine down to zero over the steps that are left."""

    def share(self, step: int, span: Span) -> float:
        if step < span.warmup_steps:
            return span.rising(step)
        progress = (step - span.warmup_steps) / max(1, span.steps - span.warmup_steps)
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))


@dataclass(frozen=True)
class WarmupCosine:
    """CLIP4Clip's: the cosine spans all steps, so that the rate falls from 1 to 0.976 where a warm-up of 0.1 ends."""

    def share(self, step: int, span: Span) -> float:
        progress = step / span.steps
        if progress < span.warmup:
            return progress / span.warmup
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


@dataclass(frozen=True)
class Step:
    """A factor at given epochs of what the schedule spans (VSE-infinity: 0.1 at epoch 15), after the warm-up.

    Args:
        at: epochs at whose beginning the rate is multiplied.
        factor: with what. Default: 0.1.

    Raises:
        ValueError: for no epoch, or a factor that is not positive.
    """

    at: tuple[float, ...]
    factor: float = 0.1

    def __post_init__(self) -> None:
        object.__setattr__(self, "at", tuple(self.at))
        if not self.at or min(self.at) < 0 or self.factor <= 0:
            raise ValueError(
                f"a step schedule needs epochs and a positive factor, but got at={self.at}, factor={self.factor}"
            )

    def share(self, step: int, span: Span) -> float:
        begun = sum(step >= epoch * span.steps_per_epoch for epoch in self.at)
        return float(span.rising(step) * self.factor**begun)


@dataclass(frozen=True)
class Constant:
    """The peak rate, after the warm-up."""

    def share(self, step: int, span: Span) -> float:
        return span.rising(step)


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "cosine": Cosine,
    "warmup_cosine": WarmupCosine,
    "step": Step,
    "constant": Constant,
}


def scheduler(optimizer: torch.optim.Optimizer, schedule: Schedule, span: Span, done: int = 0) -> LambdaLR:
    """The schedule of every group of `optimizer`; of the span `done` steps have been taken already."""

    return LambdaLR(optimizer, lambda step: schedule.share(step, span), last_epoch=done - 1)

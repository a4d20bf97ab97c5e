"""The two ends of every comparison: train everything, or nothing but the head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn


@dataclass(frozen=True, kw_only=True)
class Full:
    """Full fine-tuning: every parameter of the backbone trains ("Full" in the paper's tables)."""

    name: ClassVar[str] = "full"

    def apply(self, model: nn.Module) -> None:
        model.requires_grad_(True)


@dataclass(frozen=True, kw_only=True)
class Linear:
    """A frozen backbone: only what `inject(..., train=...)` names trains ("Linear", "Partially")."""

    name: ClassVar[str] = "linear"

    def apply(self, model: nn.Module) -> None:
        pass

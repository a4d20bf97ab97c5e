"""One Trainer for both tasks: stages, optimiser groups, the run folder, hardware; and the embedded encoders.

What needs transformers' Trainer is loaded when it is first used: that takes seconds, and a command's --help or a
mistyped word should not wait for it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import adapters  # noqa: F401  (first: transformers imports torchvision, which a CPU-only torch needs help with)
from training.choose import check_name, choose
from training.run import RunFolder

if TYPE_CHECKING:
    from training.experiment import BaseExperiment, shared_settings
    from training.hardware import Hardware, choose_hardware
    from training.kept_casts import KeptCasts
    from training.optimizers import LearningRates
    from training.plugin import ReSoRAMixin, ReSoRATrainer
    from training.stages import Recipe, Stage, run_stages

_MODULES = {
    "experiment": ("BaseExperiment", "shared_settings"),
    "hardware": ("Hardware", "choose_hardware"),
    "kept_casts": ("KeptCasts",),
    "optimizers": ("LearningRates",),
    "plugin": ("ReSoRAMixin", "ReSoRATrainer"),
    "stages": ("Recipe", "Stage", "run_stages"),
}

__all__ = [
    "BaseExperiment",
    "Hardware",
    "KeptCasts",
    "LearningRates",
    "ReSoRAMixin",
    "ReSoRATrainer",
    "Recipe",
    "RunFolder",
    "Stage",
    "check_name",
    "choose",
    "choose_hardware",
    "run_stages",
    "shared_settings",
]


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"training.{module}"), name)
    raise AttributeError(f"module 'training' has no attribute {name!r}")

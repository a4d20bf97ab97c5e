"""One Trainer for both tasks: stages, optimiser groups, the run folder, hardware; and the embedded encoders."""

from __future__ import annotations

import adapters  # noqa: F401  (first: transformers imports torchvision, which a CPU-only torch needs help with)
from training.choose import check_name, choose
from training.experiment import BaseExperiment, shared_settings
from training.hardware import Hardware, choose_hardware
from training.optimizers import LearningRates
from training.plugin import ReSoRAMixin, ReSoRATrainer
from training.run import RunFolder
from training.stages import Recipe, Stage, run_stages

__all__ = [
    "BaseExperiment",
    "Hardware",
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

"""One training loop for retrieval and classification: stages, optimiser groups, the run folder, hardware."""

from __future__ import annotations

import adapters  # noqa: F401  (first: transformers imports torchvision, which a CPU-only torch needs help with)
from training.hardware import Hardware, choose_hardware
from training.optimizers import LearningRates
from training.run import RunFolder
from training.stages import Recipe, Stage, run_stages

__all__ = ["Hardware", "LearningRates", "Recipe", "RunFolder", "Stage", "choose_hardware", "run_stages"]

"""Data sets for image classification.

>>> digits = DATASETS["digits"](train_images=400, subset_seed=0)        # doctest: +SKIP
"""

from __future__ import annotations

from typing import Any

from classification.data.dataset import SPLITS, ClassificationDataset
from classification.data.digits import Digits

DATASETS: dict[str, Any] = {"digits": Digits}

__all__ = ["DATASETS", "SPLITS", "ClassificationDataset", "Digits"]

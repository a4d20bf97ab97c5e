"""Data sets for image classification.

>>> digits = DATASETS["digits"](train_images=400, subset_seed=0)        # doctest: +SKIP
>>> cifar = DATASETS["vtab"](root="data", dataset="cifar")              # doctest: +SKIP
>>> pets = DATASETS["few_shot"](root="data", dataset="oxford-pets", shots=4, subset_seed=0)        # doctest: +SKIP

The digits come with scikit-learn. VTAB-1K and the few-shot data sets are read where the user has put them, in the list
files that prior code publishes; `python scripts/prepare_data.py data=vtab` says what to get.
"""

from __future__ import annotations

from typing import Any

from classification.data.dataset import SPLITS, ClassificationDataset
from classification.data.digits import Digits
from classification.data.few_shot import FewShot
from classification.data.vtab import Vtab

DATASETS: dict[str, Any] = {"digits": Digits, "vtab": Vtab, "few_shot": FewShot}

__all__ = ["DATASETS", "SPLITS", "ClassificationDataset", "Digits", "FewShot", "Vtab"]

"""Image classification: data sets, backbones with cached frozen blocks, training, evaluation."""

from __future__ import annotations

import adapters  # noqa: F401  (first: timm imports torchvision, which a CPU-only torch needs help with)

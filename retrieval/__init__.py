"""Image-text and video-text retrieval: data sets, encoders, models, losses, training, evaluation."""

from __future__ import annotations

import adapters  # noqa: F401  (first: transformers imports torchvision, which a CPU-only torch needs help with)

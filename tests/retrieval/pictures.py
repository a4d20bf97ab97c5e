"""Small pictures of noise."""

from __future__ import annotations

import numpy as np
from PIL import Image


def picture(seed: int, width: int = 80, height: int = 60) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))

"""What a training sees instead of the image itself, and how chance in it is made to repeat."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from classification.data.pixels import NORMALIZATIONS, Preprocessing

POLICY = "rand-m9-mstd0.5-inc1"
AUGMENTATIONS = {
    "none": "none",
    "randaugment": f"random resized crop (8 to 100 % of the area, bicubic), flip, RandAugment {POLICY} (timm)",
}
"""Name -> what it does, for the record of a run."""


def rand_augment(preprocessing: Preprocessing) -> Callable[[Image.Image], Tensor]:
    """RGB -> ``(3, size, size)`` float32: crop, flip and RandAugment of DTL's few-shot recipe, through timm.

    No colour jitter (timm leaves it out beside RandAugment), no random erasing. What a crop is resized with is not said
    there: bicubic here, as for `images`.

    Source: Cubuk et al., RandAugment (2020); Fu et al., DTL (AAAI 2024).
    """
    from timm.data import create_transform  # here: timm takes seconds to import
    from timm.data.auto_augment import RandAugment

    mean, deviation = NORMALIZATIONS[preprocessing.normalization]
    transform: Any = create_transform(
        input_size=preprocessing.size,
        is_training=True,
        auto_augment=POLICY,
        interpolation="bicubic",
        re_prob=0.0,
        mean=mean,
        std=deviation,
    )
    for operation in next(step for step in transform.transforms if isinstance(step, RandAugment)).ops:
        if operation.name.startswith("Posterize"):
            operation.aug_fn = posterize
    return transform


def posterize(image: Image.Image, bits: int, **unused: Any) -> Image.Image:
    """Keep the highest `bits` of each channel, as timm's operation; with none, black.

    timm (1.0.31) asks for 0 bits where a random magnitude is at its end, one image in some 650 here. Pillow returned
    black; from version 13 on it refuses, and a training would end with it.
    """
    if bits >= 8:
        return image
    return ImageOps.posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)


@contextmanager
def seeded(index: int, seed: int) -> Iterator[None]:
    """Chance that depends on an image's index and a seed alone, whatever generator a transform draws from.

    Python's, NumPy's and torch's global generators for the CPU are seeded, and left as they were found. Not for threads
    that draw from them at the same time.

    Raises:
        ValueError: for a negative index or seed.
    """
    if index < 0 or seed < 0:
        raise ValueError(f"index {index} and seed {seed}: expected both to be at least 0")
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    for_python, for_numpy, for_torch = np.random.SeedSequence((seed, index)).generate_state(3).tolist()
    random.seed(for_python)
    np.random.seed(for_numpy)
    torch.default_generator.manual_seed(for_torch)  # torch.manual_seed would also seed every accelerator
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])

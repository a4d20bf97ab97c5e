"""From an image file to what a backbone takes: RGB, stretched to a square, normalised."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

Colour = tuple[float, float, float]

NORMALIZATIONS: dict[str, tuple[Colour, Colour]] = {
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}
"""Name -> mean and standard deviation of each channel, on a scale from 0 to 1."""


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Pixels of an image as prior code makes them: a bicubic stretch without a crop, / 255, normalised.

    Args:
        size: side in pixels.
        normalization: "half", what ViT-B/16's weights of ImageNet-21k were trained with (DTL, SSF); "imagenet" (FacT,
            NOAH); "none", only / 255 (PETL-ViT's Adapter). It is worth a point of accuracy (PETL-ViT, issue 14).

    Raises:
        ValueError: for a size below 1 or an unknown normalisation.
    """

    size: int
    normalization: str

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"data.size is {self.size}; expected at least 1 pixel")
        if self.normalization not in NORMALIZATIONS:
            known = ", ".join(NORMALIZATIONS)
            raise ValueError(f"data.normalization is {self.normalization!r}; choose from {known}")

    @property
    def text(self) -> str:
        """What was done, for the record of a run."""
        after = "not normalised" if self.normalization == "none" else f"normalised ({self.normalization}: {self._said})"
        return f"RGB, bicubic stretch to {self.size} x {self.size} px, / 255, {after}"

    @property
    def _said(self) -> str:
        mean, deviation = NORMALIZATIONS[self.normalization]
        return " and ".join("/".join(str(value) for value in dict.fromkeys(values)) for values in (mean, deviation))

    @cached_property
    def _statistics(self) -> tuple[Tensor, Tensor]:
        mean, deviation = NORMALIZATIONS[self.normalization]
        return torch.tensor(mean)[:, None, None], torch.tensor(deviation)[:, None, None]

    def __call__(self, image: Image.Image) -> Tensor:
        """RGB of any size -> ``(3, size, size)`` float32."""
        resized = image.resize((self.size, self.size), Image.Resampling.BICUBIC)  # with antialiasing, as Pillow's is
        pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1).float() / 255  # (3, size, size)
        mean, deviation = self._statistics
        return ((pixels - mean) / deviation).contiguous()


def read_image(path: Path) -> Image.Image:
    """A file as RGB, decoded.

    Raises:
        ValueError: if it is not there, or Pillow cannot read it; the message names the file.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:  # what Pillow raises for damaged files is of many kinds: OSError, SyntaxError, ...
        raise ValueError(f"{path} cannot be read as an image: {error}; get this file again") from error

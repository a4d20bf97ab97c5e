"""Small pictures of noise, and the kill of a process that was writing about them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def picture(seed: int, width: int = 80, height: int = 60) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def write_pictures(folder: Path) -> Path:
    """0.png to 5.png, 20 to 70 pixels wide."""
    for number in range(6):
        picture(number, width=20 + 10 * number).save(folder / f"{number}.png")
    return folder


class Killed(BaseException):
    """No error of a program, and, other than KeyboardInterrupt, no end of the tests."""


def killed_while_writing(path: Path, *_: object, **__: object) -> int:
    """In place of `Path.write_text`: the file has been opened, and nothing is in it yet."""
    path.write_bytes(b"")
    raise Killed

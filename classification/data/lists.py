"""List files: an image a line, its path and its label. The format of VTAB-1K's and the few-shot data sets' files."""

from __future__ import annotations

import os
import posixpath
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path, PureWindowsPath

import numpy as np


@dataclass(frozen=True)
class ImageList:
    """What a list file says, each image once.

    Attributes:
        file: the list.
        names: path of each image from the folder of the images on, with ``/``, in the file's order.
        labels: ``(n,)`` int64.
        lines: lines that name an image; more than names where lines repeat one.
    """

    file: Path
    names: tuple[str, ...]
    labels: np.ndarray
    lines: int

    @property
    def repeated(self) -> int:
        """Lines that say again what an earlier one says."""
        return self.lines - len(self.names)


def read_list(file: Path, classes: int | None = None) -> ImageList:
    """Read ``<path> <label>`` lines; the path may hold spaces, as the label follows the last one.

    A line that repeats another, path and label, counts in `lines` only: an image is not in a split twice. Empty lines
    say nothing and are passed over.

    Args:
        file: the list.
        classes: labels are below it; None takes any number from 0 on.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not of the form, its path leads out of the folder of the images, its label is out of
            range or contradicts an earlier line, or the file names no image; the message has the number of the line.
    """
    expected = "an integer label" if classes is None else f"a label from 0 to {classes - 1}"
    found: dict[str, tuple[int, int]] = {}  # name -> label, number of the line
    lines = 0
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file} is no text in UTF-8 ({error}); expected lines of an image's path and a label"
        ) from None
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would also split at rarer characters in a name
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        path, _, label = line.strip().rpartition(" ")
        if not path or not (label.isascii() and label.isdigit() and len(label) < 10):
            raise ValueError(f"{where} is {line.strip()[:80]!r}; expected an image's path, a space and {expected}")
        if classes is not None and int(label) >= classes:
            raise ValueError(f"{where}: label {label} is out of range; expected {expected}")
        name = _checked_name(path.strip(), where)
        earlier = found.setdefault(name, (int(label), number))
        if earlier[0] != int(label):
            raise ValueError(f"{where}: {name} has label {label} here and {earlier[0]} in line {earlier[1]}")
        lines += 1
    if not found:
        raise ValueError(f"{file} names no image; expected lines of an image's path and a label")
    return ImageList(file, tuple(found), np.array([label for label, _ in found.values()], dtype=np.int64), lines)


def check_disjoint(lists: Sequence[ImageList]) -> None:
    """Raise ValueError if an image is in two of the lists."""
    for first, second in combinations(lists, 2):
        if both := sorted(set(first.names) & set(second.names)):
            raise ValueError(
                f"{len(both)} images are in {first.file} as well as in {second.file} ({named(both)}); expected none"
            )


def missing_files(folder: Path, names: Iterable[str]) -> list[str]:
    """The names that are no file in `folder`. Each folder is listed once, and no file is asked for by itself."""
    by_parent: dict[str, list[str]] = defaultdict(list)
    for name in names:
        by_parent[posixpath.dirname(name)].append(name)
    missing = []
    for parent, inside in by_parent.items():
        try:
            with os.scandir(folder / parent) as entries:
                there = {entry.name for entry in entries if entry.is_file()}
        except (FileNotFoundError, NotADirectoryError):
            there = set()
        missing += [name for name in inside if posixpath.basename(name) not in there]
    return missing


def named(names: Sequence[str], shown: int = 3) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def _checked_name(path: str, where: str) -> str:
    name = posixpath.normpath(path)
    if "\\" in name:
        raise ValueError(f"{where}: {path!r} has a backslash; expected / between folders")
    if name.startswith(("/", "../")) or name in (".", "..") or (":" in name and PureWindowsPath(name).drive):
        raise ValueError(f"{where}: {path!r} leads out of the folder of the images; names must stay inside it")
    return name

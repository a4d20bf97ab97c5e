"""What the lists and images of a data set hold, before a training starts: counts beside the published ones."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from classification.data.folder import ListedFolder, class_count
from classification.data.lists import ImageList, missing_files, named, read_list
from classification.data.pixels import read_image

LOOKED_AT = 64  # images of each list that are decoded
HELD_OUT = {"val200", "validation", "test"}  # lists that share no image with any other
SHOWN = 20  # problems that are listed one by one


@dataclass(frozen=True)
class DatasetCount:
    """One data set: what is there, and what is published.

    Attributes:
        dataset: its name.
        group: see `ListedFolder`.
        classes: as far as the labels say, and published; None where no list can be read.
        lines: column of the table -> lines of its lists, and published; lists of a column are summed.
        missing: images that a list names and that are not there.
        unreadable: images that cannot be decoded, of those that were looked at.
    """

    dataset: str
    group: str
    classes: tuple[int | None, int]
    lines: Mapping[str, tuple[int, int]]
    missing: int
    unreadable: int


@dataclass(frozen=True)
class Verification:
    """The result of a data set's `verify`.

    Attributes:
        counts: one entry a data set.
        problems: in words, each with the file it is about; an empty list is data that are whole.
        notes: what is odd but as published.
    """

    counts: Sequence[DatasetCount]
    problems: Sequence[str] = field(default_factory=list)
    notes: Sequence[str] = field(default_factory=list)

    def table(self) -> pd.DataFrame:
        """One row a data set; a cell "998 / 1000" is what was found and what is published."""
        rows = [
            {
                "data set": each.dataset,
                **({"group": each.group} if each.group else {}),
                "classes": f"{'-' if each.classes[0] is None else each.classes[0]} / {each.classes[1]}",
                **{column: f"{found} / {published}" for column, (found, published) in each.lines.items()},
                "missing": each.missing,
                "unreadable": each.unreadable,
            }
            for each in self.counts
        ]
        return pd.DataFrame(rows).set_index("data set")

    def text(self) -> str:
        """For people: the table, notes, the first problems and how many more there are."""
        lines = [self.table().to_string(), "(found / published)", "", *(f"note: {note}" for note in self.notes)]
        lines += [f"- {problem}" for problem in self.problems[:SHOWN]]
        if (more := len(self.problems) - SHOWN) > 0:
            lines.append(f"- and {more} more")
        return "\n".join([*lines, "nothing is wrong" if not self.problems else f"{len(self.problems)} problems"])


def verify_folders(folders: Sequence[ListedFolder], *, check_counts: bool, decode: bool) -> Verification:
    """Read every list of every folder, ask for each image that they name, and decode a sample of each list.

    Args:
        folders: at least one.
        check_counts: other numbers of lines and classes than the published ones are problems.
        decode: decode all images instead.

    Raises:
        FileNotFoundError: no list of any folder is there; the message says how to get them.
    """
    if not any(folder.is_there for folder in folders):
        raise FileNotFoundError(
            f"none of {', '.join(each.dataset for each in folders)} is there.\n{folders[0].sources}"
        )
    counts, notes = [], []
    absent = [each.dataset for each in folders if not each.is_there]
    problems = [f"{len(absent)} data sets are not there: {', '.join(absent)}"] if absent else []
    for folder in tqdm(folders, unit="data set", disable=len(folders) < 2):
        count, wrong, odd = _verify(folder, check_counts, decode)
        counts.append(count)
        problems += wrong
        notes += odd
    return Verification(counts, problems, notes)


def _verify(folder: ListedFolder, check_counts: bool, decode: bool) -> tuple[DatasetCount, list[str], list[str]]:
    read, problems = _read(folder, check_counts)
    if check_counts and read:
        problems += folder.wrong_counts(read)
    problems += _shared(read)
    absent = missing_files(folder.images, dict.fromkeys(name for each in read.values() for name in each.names))
    if absent:
        problems.append(f"{folder.dataset}: {len(absent)} images are not in {folder.images} ({named(absent)})")
    chosen = dict.fromkeys(
        each.names[index]
        for each in read.values()
        for index in spaced(np.arange(len(each.names)), len(each.names) if decode else LOOKED_AT)
    )
    for name in absent:
        chosen.pop(name, None)
    unreadable = _unreadable(folder, chosen)
    if unreadable:
        problems.append(f"{folder.dataset}: {len(unreadable)} of {len(chosen)} images looked at: {unreadable[0]}")
    lines: dict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
    for label, published in folder.lines.items():
        column = label.partition(",")[0]  # "1-shot, seed 0": the seeds share a column
        lines[column] = (lines[column][0] + (read[label].lines if label in read else 0), lines[column][1] + published)
    classes = class_count(read.values()) if read else None
    notes = [
        f"{each.file}: {each.repeated} of {each.lines} lines repeat an earlier one; each image counts once"
        for each in read.values()
        if each.repeated
    ]
    return (
        DatasetCount(
            folder.dataset, folder.group, (classes, folder.classes), dict(lines), len(absent), len(unreadable)
        ),
        problems,
        notes,
    )


def _read(folder: ListedFolder, check_counts: bool) -> tuple[dict[str, ImageList], list[str]]:
    """The lists that can be read, and what is wrong with the others."""
    read, problems = {}, []
    if not folder.is_there:
        return {}, []  # said for all such folders at once
    for label, file in folder.lists.items():
        try:
            read[label] = read_list(file, folder.classes if check_counts else None)
        except FileNotFoundError:
            problems.append(f"{folder.dataset}: there is no {file}")
        except ValueError as error:
            problems.append(f"{folder.dataset}: {error}")
    return read, problems


def _shared(read: Mapping[str, ImageList]) -> list[str]:
    """What a training would refuse: images for validation or test that are also in another list."""
    problems = []
    names = {label: set(each.names) for label, each in read.items()}
    for one, two in combinations(read, 2):
        if {one, two} & HELD_OUT and (both := sorted(names[one] & names[two])):
            files = f"{read[one].file} as well as in {read[two].file}"
            problems.append(f"{len(both)} images are in {files} ({named(both)})")
    return problems


def _unreadable(folder: ListedFolder, names: Iterable[str]) -> list[str]:
    def problem(name: str) -> str | None:
        try:
            read_image(folder.images / name)
        except ValueError as error:
            return str(error)
        return None

    with ThreadPoolExecutor() as pool:  # Pillow decodes outside Python's lock
        return [reason for reason in pool.map(problem, names) if reason]


def spaced(indices: np.ndarray, count: int) -> list[int]:
    """At most `count` of the indices, evenly spaced, the first and the last among them."""
    chosen = np.unique(np.linspace(0, len(indices) - 1, min(count, len(indices))).astype(int))
    return indices[chosen].tolist() if len(indices) else []

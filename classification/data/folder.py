"""A data set on the disk: where its lists and its images are, and what is published about them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from classification.data.lists import ImageList, missing_files, named, read_list


@dataclass(frozen=True, kw_only=True)
class ListedFolder:
    """Images named by list files.

    Attributes:
        dataset: the name of its folder.
        group: which results are averaged with its own; "" where there are no groups.
        images: the folder that the paths in the lists start from.
        lists: label of a list ("train800", "1-shot, seed 0") -> its file.
        lines: label of a list -> how many lines the published one has.
        classes: published number of them.
        sources: what to get and where to put it, in words, for those who have no such folder yet.
    """

    dataset: str
    group: str
    images: Path
    lists: Mapping[str, Path]
    lines: Mapping[str, int]
    classes: int
    sources: str

    @property
    def is_there(self) -> bool:
        """Whether any of the lists is."""
        return any(file.is_file() for file in self.lists.values())

    def read(self, labels: Iterable[str], *, check_counts: bool) -> dict[str, ImageList]:
        """The named lists; all of their images are there.

        Args:
            labels: which lists.
            check_counts: refuse other numbers of lines and classes than the published ones.

        Raises:
            FileNotFoundError: a list or an image is not there; the message says what to get.
            ValueError: a list is not of its form (see `read_list`), or has other counts than the published one.
        """
        files = {label: self.lists[label] for label in labels}
        if absent := [str(file) for file in files.values() if not file.is_file()]:
            raise FileNotFoundError(f"{self.dataset}: there is no {' and no '.join(absent)}.\n{self.sources}")
        read = {label: read_list(file, self.classes if check_counts else None) for label, file in files.items()}
        if check_counts and (problems := self.wrong_counts(read)):
            raise ValueError("; ".join(problems))
        for each in read.values():
            if absent := missing_files(self.images, each.names):
                raise FileNotFoundError(
                    f"{self.dataset}: {len(absent)} of the {len(each.names)} images in {each.file} are not in "
                    f"{self.images} ({named(absent)}).\n{self.sources}"
                )
        return read

    def wrong_counts(self, read: Mapping[str, ImageList]) -> list[str]:
        """What in these lists is not as published, in words."""
        mend = "if other files are meant, set data.check_counts=false"
        problems = [
            f"{each.file} has {each.lines} lines, published are {self.lines[label]}; {mend}"
            for label, each in read.items()
            if each.lines != self.lines[label]
        ]
        # without the test list, a class may only be absent: the first 1,000 images are not stratified
        if "test" in read and (classes := class_count(read.values())) != self.classes:
            problems.append(
                f"{self.dataset}: the labels of {', '.join(read)} end at {classes - 1}, that is {classes} classes, "
                f"published are {self.classes}; {mend}"
            )
        return problems


def class_count(lists: Iterable[ImageList]) -> int:
    """Classes as far as the labels say: one more than the largest; a class in between may have no image."""
    return 1 + max(int(each.labels.max()) for each in lists)

"""What a data set's files hold, before a training starts: counts beside the published ones, and what is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

SHOWN = 10  # problems of one kind that are listed one by one


@dataclass(frozen=True)
class SplitCount:
    """One split: what is there, and what the published split has (None where nothing is published).

    Attributes:
        split: its name in the files.
        items: images or videos that the annotations name.
        captions: sentences.
        missing: items without a file (or without features).
        unreadable: items whose file cannot be read.
        published: (items, captions) of the published split, or None.
    """

    split: str
    items: int
    captions: int
    missing: int = 0
    unreadable: int = 0
    published: tuple[int, int] | None = None


@dataclass(frozen=True)
class Verification:
    """The result of a data set's `verify`.

    Attributes:
        splits: one entry a split.
        problems: in words, each with the file or item it is about; an empty list is a data set that is whole.
        notes: what else a training needs, and whether it is there.
    """

    splits: Sequence[SplitCount]
    problems: Sequence[str] = field(default_factory=list)
    notes: Sequence[str] = ()

    def table(self) -> pd.DataFrame:
        """One row a split, with the published counts beside those of the files."""
        rows = [
            {
                "split": each.split,
                "items": each.items,
                "published": "-" if each.published is None else each.published[0],
                "captions": each.captions,
                "published ": "-" if each.published is None else each.published[1],
                "missing": each.missing,
                "unreadable": each.unreadable,
            }
            for each in self.splits
        ]
        return pd.DataFrame(rows).set_index("split")

    def text(self) -> str:
        """For people: the table, the notes, then the first problems and how many more there are."""
        lines = [self.table().to_string(), "", *self.notes]
        lines += [f"- {problem}" for problem in self.problems[:SHOWN]]
        if (more := len(self.problems) - SHOWN) > 0:
            lines.append(f"- and {more} more")
        return "\n".join([*lines, "nothing is wrong" if not self.problems else f"{len(self.problems)} problems"])


def pretrained_note(what: str, *files: Path) -> str:
    """Whether what a data set's published recipe starts from is at its default place."""
    missing = [str(file) for file in files if not file.is_file()]
    return f"{what} is {'not there yet' if missing else 'there'}: {', '.join(missing) or files[0]}"

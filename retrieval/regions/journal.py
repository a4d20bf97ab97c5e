"""Which pictures an extraction has done: a line of JSON for each, after a first one that says how they are done."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from retrieval.regions.writing import write_whole


class Journal:
    """The file beside `{split}_ims.npy.partial`, and what it says of each picture.

    Args:
        path: of the file.
        settings: what the regions depend on.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path, self.settings = path, settings

    def begin(self, rows: int, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """The entries of before that hold; the file then has them alone.

        These are the entries whose regions are among the `rows` on the disk, without those at the end that could not
        be read: what was wrong with them may have been the disk or the network, so they are tried again.

        Args:
            rows: regions on the disk.
            numbers: of the pictures, in order.

        Raises:
            ValueError: it was begun with other settings, or its pictures are not those of `numbers`.
        """
        entries: list[dict[str, Any]] = []
        lines = self.path.read_text(encoding="utf-8").split("\n")[:-1] if self.path.is_file() else []
        if lines:  # the last element of the split, dropped above, is empty or a line that was cut off
            if (earlier := json.loads(lines[0])) != self.settings:
                raise ValueError(
                    f"{self.path} was begun with {earlier}, not with {self.settings} (pictures: a digest of their "
                    "numbers and files); give the split file and the options that it was begun with, or delete it and "
                    "its .partial file to begin anew"
                )
            entries = [json.loads(line) for line in lines[1:]]
        found = [entry["number"] for entry in entries]
        if found != list(numbers[: len(found)]):
            raise ValueError(
                f"{self.path} has its pictures in another order than the split file, as if two extractions had written "
                "it; delete it and its .partial file to begin anew"
            )
        while entries and (sum(entry["boxes"] for entry in entries) > rows or "unreadable" in entries[-1]):
            entries.pop()
        text = "".join(json.dumps(line) + "\n" for line in [self.settings, *entries])
        write_whole(self.path, text)
        return entries

    def append(self, entry: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

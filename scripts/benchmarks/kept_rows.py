"""The rows of a benchmark, each with the run that measured it last: any of them can be measured anew alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

KEY = ("part", "backbone", "layers", "batch", "precision", "method")
"""By what a row is the same row; not all rows have all of them."""


class Rows:
    """What the file of raw numbers holds.

    Attributes:
        runs: what each run was measured with.
        rows: each with the number of its run, counted from 1, in the order in which they were first measured.

    Raises:
        ValueError: the file holds something else.
    """

    def __init__(self, path: Path) -> None:
        self.runs: list[Mapping[str, Any]] = []
        self.rows: list[dict[str, Any]] = []
        if not path.is_file():
            return
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or found.keys() != {"runs", "rows"}:
            raise ValueError(f"{path} does not hold runs and rows: remove it or choose another --output")
        self.runs, self.rows = found["runs"], found["rows"]

    def add(self, run: Mapping[str, Any], row: Mapping[str, Any]) -> None:
        """Put a row in the place of the one that it measures anew; a run without a row any more goes."""
        runs = self.runs if self.runs[-1:] == [run] else [*self.runs, run]
        new = {_key(row): {**row, "run": len(runs)}}
        kept = [new.pop(_key(before), before) for before in self.rows] + list(new.values())
        numbers = sorted({each["run"] for each in kept})
        self.runs = [runs[number - 1] for number in numbers]
        self.rows = [{**each, "run": numbers.index(each["run"]) + 1} for each in kept]

    def of(self, part: str) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["part"] == part]

    def raw(self) -> dict[str, Any]:
        """For the file."""
        return {"runs": self.runs, "rows": self.rows}


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    values = (row.get(name) for name in KEY)
    return tuple(tuple(value) if isinstance(value, list) else value for value in values)

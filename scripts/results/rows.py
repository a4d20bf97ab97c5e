"""Results -> the rows of a table: mean and deviation over seeds, paired difference to the row without a penalty."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from classification.data.vtab import GROUPS, VTAB_1K
from eval.metrics import RECALL_KEYS
from eval.significance import PairedDifference, holm, paired_difference
from eval.vtab import vtab_averages
from results.few_shot import OF_ONE, with_averages
from results.runs import Result

Seed = tuple[int, ...]
NAMES = ("model", "adapter", "regularizer")
ALWAYS_SHOWN = {"data.validation": "test", "protocol.name": "as_published"}  # prior work's way


@dataclass(kw_only=True)
class Row:
    """Runs that differ in nothing but the seed (and the data set, where data sets are columns).

    Attributes:
        settings: what they share.
        scores: seed -> {column: score}.
        label: the settings in which the table's rows differ, besides NAMES.
        reference: number of the row without a penalty that it is compared with, from 1.
        difference: to that row, on the table's headline, over the seeds of both; None for fewer than two.
        p: of the difference, corrected by Holm over the table.
    """

    settings: dict[str, Any]
    scores: dict[Seed, dict[str, float]] = field(default_factory=dict)
    label: str = ""
    reference: int | None = None
    difference: PairedDifference | None = None
    p: float | None = None

    def name(self, of: str) -> str:
        return str(self.settings[f"{of}.name"])

    def values(self, column: str) -> list[float]:
        """One a seed."""
        return [scores[column] for scores in self.scores.values() if column in scores]

    def mean(self, column: str) -> float | None:
        values = self.values(column)
        return fmean(values) if values else None

    def deviation(self, column: str) -> float | None:
        """Of the sample; None for fewer than two seeds."""
        values = self.values(column)
        return stdev(values) if len(values) > 1 else None

    def seeds(self, columns: Iterable[str]) -> str:
        """Their number, or "1 to 3" where columns have different ones."""
        counts = [count for column in columns if (count := len(self.values(column)))]
        return str(max(counts)) if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"


@dataclass(frozen=True, kw_only=True)
class Table:
    """All rows of one data set, or of one collection of them.

    Attributes:
        name: as in `Result.table`.
        measured: columns that runs have scored.
        derived: columns that follow from those, seed by seed.
        headline: the column on which rows are compared.
        selections: how weights were selected, in words; several where rows differ in it.
    """

    name: str
    measured: tuple[str, ...]
    derived: tuple[str, ...]
    headline: str
    rows: tuple[Row, ...]
    selections: tuple[str, ...]


def make_tables(results: Iterable[Result]) -> tuple[list[Table], dict[Path, str]]:
    """A table for each data set, one of few-shot averages; and what is there twice, {its folder: the one taken}."""
    by_table: dict[str, list[Result]] = defaultdict(list)
    for result in with_averages(results):
        by_table[result.table].append(result)
    tables, twice = [], dict[Path, str]()
    for name, some in sorted(by_table.items()):
        rows, again = _rows(some)
        twice |= again
        measured, derived, headline = _columns(name, rows)
        for row in rows:
            for scores in row.scores.values():
                scores |= _derived(name, scores, measured)
        _label(rows)
        rows.sort(key=_order)
        _compare(rows, headline)
        selections = tuple(dict.fromkeys(result.selection for result in some))
        tables.append(Table(name=name, measured=measured, derived=derived, headline=headline, rows=tuple(rows),
                            selections=selections))  # fmt: skip
    return tables, twice


def _rows(results: Iterable[Result]) -> tuple[list[Row], dict[Path, str]]:
    rows: dict[str, Row] = {}
    taken: dict[tuple[str, Seed, str], Path] = {}
    twice: dict[Path, str] = {}
    for result in results:
        key = _key(result.settings)
        scores = rows.setdefault(key, Row(settings=result.settings)).scores.setdefault(result.seed, {})
        for column, score in result.scores.items():
            first = taken.setdefault((key, result.seed, column), result.path)
            if first == result.path:
                scores[column] = score
            elif "after" not in result.settings:  # runs with different penalties share their first stage
                twice[result.path] = f"the same settings and seed as {first}"
    return list(rows.values()), twice


def _key(settings: Mapping[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True, default=str)


def _columns(table: str, rows: Iterable[Row]) -> tuple[tuple[str, ...], tuple[str, ...], str]:
    """(measured, derived, headline) of a table."""
    there = {column for row in rows for scores in row.scores.values() for column in scores}
    if table.startswith("retrieval "):
        return (*RECALL_KEYS, "rsum"), (), "rsum"
    if table == "classification vtab":
        measured = tuple(name for name in VTAB_1K if name in there)
        return measured, (*GROUPS, "average", "all"), "average" if len(measured) > 1 else measured[0]
    if table.startswith(OF_ONE):
        shots = tuple(sorted(there, key=int))
        return (shots, ("mean",), "mean") if len(shots) > 1 else (shots, (), shots[0])
    return ("accuracy",), (), "accuracy"


def _derived(table: str, scores: Mapping[str, float], measured: Iterable[str]) -> dict[str, float]:
    """Averages of one seed over data sets or shots; an average over fewer than all is left out."""
    if table == "classification vtab":
        return {name: mean for name, mean in vtab_averages(scores, GROUPS).items() if mean is not None}
    if table.startswith(OF_ONE) and all(shots in scores for shots in measured):
        return {"mean": fmean(scores[shots] for shots in measured)}
    return {}


def _label(rows: Iterable[Row]) -> None:
    """Say in each row which settings some other row of the same model, adapter, ... has otherwise.

    A rank, say, is compared among rows of one adapter: others may have none; and what later stages use is no matter of
    a row that is of an earlier one. So no two rows look the same.
    """
    rows = list(rows)
    keys = sorted({key for row in rows for key in row.settings if key not in {f"{name}.name" for name in NAMES}})
    for row in rows:
        parts = []
        for key in keys:
            group = f"{key.rpartition('.')[0]}.name"
            alike = [r for r in rows if key == group or r.settings.get(group) == row.settings.get(group)]
            alike = [r for r in alike if key in r.settings or "after" not in r.settings]
            value = row.settings.get(key)
            differs = len({json.dumps(r.settings.get(key, "unset"), default=str) for r in alike}) > 1
            if (differs and key in row.settings) or (value is not None and value == ALWAYS_SHOWN.get(key)):
                parts.append(f"{key}={value}")
        row.label = ", ".join(parts)


def _order(row: Row) -> tuple[Any, ...]:
    names = [row.name(name) for name in NAMES]
    return (*names[:2], names[2] != "none", "after" in row.settings, names[2], row.label)


def _compare(rows: list[Row], headline: str) -> None:
    """Compare each row that has a penalty with the row that is most like it without one, seed by seed."""
    for row in rows:
        alike = [(likeness, number) for number, other in enumerate(rows, 1) if (likeness := _likeness(row, other))]
        if not alike:
            continue
        row.reference = min(alike)[1]
        other = rows[row.reference - 1]
        both = [s for s in sorted(row.scores) if headline in row.scores[s] and headline in other.scores.get(s, {})]
        if len(both) > 1:
            one, without = ([which.scores[seed][headline] for seed in both] for which in (row, other))
            row.difference = paired_difference(one, without)
    compared = [row for row in rows if row.difference]
    for row, p in zip(compared, holm([row.difference.p for row in compared if row.difference]), strict=True):
        row.p = p


def _likeness(row: Row, other: Row) -> tuple[int, int] | None:
    """How much `other` is what `row` would be without its penalty, least first; None where it is something else.

    First what trained as long without it, then the first stage of these runs, then a row whose stages are others (the
    first stage as a run of its own, say).
    """
    if row.name("regularizer") == "none" or other.name("regularizer") != "none":
        return None
    keys = {key for key in row.settings.keys() | other.settings.keys() if not key.startswith("regularizer.")}
    differing = {key for key in keys if row.settings.get(key) != other.settings.get(key)}
    stages = {key for key in differing if key.startswith("trainer.stages.")}
    if differing - stages == {"after"}:
        return None if stages & other.settings.keys() else (1, 0)
    if differing != stages:
        return None
    return (2, len(stages)) if stages else (0, 0)

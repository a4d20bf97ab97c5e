"""Tables as Markdown whose columns are aligned, to be read as it is, and as rows for a CSV file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.metrics import RECALL_KEYS
from results.few_shot import AVERAGE
from results.rows import NAMES, Row, Table

TITLES = {
    **{key: key.replace("_", " ") for key in RECALL_KEYS},
    **{"rsum": "Rsum", "average": "Average", "all": "All", "mean": "Mean"},
    **{group: group.capitalize() for group in ("natural", "specialized", "structured")},
}
R_AT_K = "R@K is a hit rate: the percentage of queries with a right answer among the first K."
FIVE = "Each score is a mean over the five data sets; a seed counts only if it has all five."
AVERAGES = "Average: mean of the groups' means; All: mean of the data sets. Both are of the seeds that have all 19."
ROOM = 10  # scores side by side


def render(tables: Sequence[Table], left_out: Mapping[Path, str]) -> str:
    """All tables, and the runs that are in none of them."""
    parts = [_render(table) for table in tables]
    if left_out:
        lines = [f"{len(left_out)} run(s) left out:"]
        parts.append("\n".join([*lines, *(f"- {path}: {reason}" for path, reason in sorted(left_out.items()))]))
    return "\n\n".join(parts)


def csv_rows(tables: Sequence[Table]) -> list[dict[str, Any]]:
    """{column: value} of each row: for each score its mean and, as "<score> sd", its deviation."""
    return [_csv_row(table, number, row) for table in tables for number, row in enumerate(table.rows, 1)]


def _csv_row(table: Table, number: int, row: Row) -> dict[str, Any]:
    columns = (*table.measured, *table.derived)
    found: dict[str, Any] = {"table": table.name, "#": number, **{name: row.name(name) for name in NAMES}}
    found |= {"settings": row.label, "seeds": row.seeds(table.measured)}
    for column in columns:
        found |= {column: row.mean(column), f"{column} sd": row.deviation(column)}
    found["against"] = row.reference
    if row.difference:
        found |= {"difference": row.difference.mean, "low": row.difference.low, "high": row.difference.high, "p": row.p}
    return found


def _render(table: Table) -> str:
    """Where runs have more scores than there is room for, these are a grid of their own, with rows as columns."""
    compared = any(row.difference for row in table.rows)
    settings = ["settings"] if any(row.label for row in table.rows) else []
    wide = len(table.measured) > ROOM
    columns = table.derived if wide else (*table.measured, *table.derived)
    header = ["#", *NAMES, *settings, "seeds", *(TITLES.get(column, column) for column in columns)]
    lines = []
    for number, row in enumerate(table.rows, 1):
        words = [f"#{number}", *(row.name(name) for name in NAMES), *([row.label] if settings else [])]
        lines.append([*words, row.seeds(table.measured), *(_score(row, column) for column in columns)])
    if compared:
        header += ["against", f"difference in {TITLES.get(table.headline, table.headline)}", "p"]
        lines = [line + _difference(row) for line, row in zip(lines, table.rows, strict=True)]
    grids = [_grid([header, *lines], words=1 + len(NAMES) + len(settings))]
    if wide:
        header = ["", *(f"#{number}" for number in range(1, len(table.rows) + 1))]
        lines = [[column, *(_score(row, column) for row in table.rows)] for column in table.measured]
        grids.append(_grid([header, *lines], words=1))
    return "\n\n".join([f"## {table.name}", *grids, "\n".join(_notes(table, compared))])


def _difference(row: Row) -> list[str]:
    if row.difference is None or row.p is None:
        return ["", "", ""]
    gain = row.difference
    return [f"#{row.reference}", f"{gain.mean:+z.2f} [{gain.low:+z.2f}, {gain.high:+z.2f}]", f"{row.p:.3f}"]


def _score(row: Row, column: str) -> str:
    mean, deviation = row.mean(column), row.deviation(column)
    if mean is None:
        return "-"
    return f"{mean:.1f}" if deviation is None else f"{mean:.1f} ± {deviation:.1f}"


def _notes(table: Table, compared: bool) -> list[str]:
    notes = ["Test split; mean ± standard deviation over the seeds."]
    if "rsum" in table.measured:
        notes.append(R_AT_K)
    if table.name == AVERAGE:
        notes.append(FIVE)
    if "average" in table.derived:
        notes.append(AVERAGES)
    if compared:
        differences = sum(row.difference is not None for row in table.rows)
        notes.append(
            "Against the row without a penalty, same seeds: mean difference, its 95 % interval (Student's t), p of the "
            f"paired t-test, corrected by Holm over {differences} difference(s)."
        )
    notes.append("Weights of " + "; or ".join(table.selections) + ".")
    if any(row.settings.get("data.validation") == "test" for row in table.rows):
        notes.append("data.validation=test: validated on the test split, as in prior work.")
    return notes


def _grid(rows: Sequence[Sequence[str]], words: int) -> str:
    """A Markdown table; all columns but the first `words` are numbers, and stand to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    rule = [("-" * width if column < words else "-" * (width - 1) + ":") for column, width in enumerate(widths)]
    lines = []
    for row in (rows[0], rule, *rows[1:]):
        cells = [
            (str.ljust if column < words else str.rjust)(row[column], widths[column]) for column in range(len(row))
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)

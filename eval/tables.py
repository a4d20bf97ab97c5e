"""The results table as plain text, for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from eval.metrics import RECALL_AT, RECALL_KEYS

SPLITS = ("train", "validation", "test")


def table_rows(metrics: Mapping[str, Any]) -> list[tuple[str, Mapping[str, float]]]:
    """(label, values) of each row: a split, then the level of chance for its size.

    Args:
        metrics: the content of metrics.json, {"validation": {...}, "test": {...}, "chance": {"test": {...}, ...}};
            one split or several. Where "validation_is" names another split, as in prior work that selects on test,
            the row of validation is labelled so.

    Raises:
        ValueError: if there is no split, or a split has no level of chance.
    """
    if not set(SPLITS) & set(metrics):
        raise ValueError(f"metrics: expected one of {', '.join(SPLITS)}, and 'chance'; received {sorted(metrics)}")
    rows: list[tuple[str, Mapping[str, float]]] = []
    for split in (name for name in SPLITS if name in metrics):
        if split not in metrics.get("chance", {}):
            raise ValueError(
                f"metrics: no level of chance for '{split}'; add chance_level(...) as ['chance']['{split}']"
            )
        same = metrics.get("validation_is") if split == "validation" else None
        label = f"{split} = {same}" if same else split
        rows += [(label, metrics[split]), ("  chance", metrics["chance"][split])]
    return rows


def render_table(metrics: Mapping[str, Any]) -> str:
    """Recalls in both directions and Rsum, one line a split, each followed by the level of chance.

                        image to text        text to image
                      R@1    R@5   R@10    R@1    R@5   R@10     Rsum
        validation   31.4   62.0   74.8   24.9   54.1   67.2    314.4
          chance      0.5    2.5    4.9    0.5    2.5    5.0     15.9

    Args:
        metrics: as in `table_rows`.

    Raises:
        ValueError: as in `table_rows`.
    """
    return render_rows(table_rows(metrics))


def render_rows(rows: Sequence[tuple[str, Mapping[str, float]]]) -> str:
    """`render_table` of labelled rows, each with the keys of `retrieval_metrics`."""
    width = 7 * len(RECALL_AT)
    first = max(12, *(len(label) + 1 for label, _ in rows))
    lines = [
        f"{'':<{first}}{'image to text':>{width}}{'text to image':>{width}}",
        f"{'':<{first}}" + "".join(f"{f'R@{k}':>7}" for k in RECALL_AT) * 2 + f"{'Rsum':>9}",
    ]
    for label, values in rows:
        numbers = "".join(f"{values[key]:7.1f}" for key in RECALL_KEYS)
        lines.append(f"{label:<{first}}{numbers}{values['rsum']:9.1f}")
    return "\n".join(lines)

"""The results table as plain text, for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from eval.metrics import RECALL_AT, RECALL_KEYS

SPLITS = ("train", "validation", "test")


def table_rows(metrics: Mapping[str, Any]) -> list[tuple[str, Mapping[str, float]]]:
    """(label, values) of each row: a split, then the level of chance for its size.

    Args:
        metrics: the content of metrics.json, {"validation": {...}, "test": {...}, "chance": {"test": {...}, ...}};
            one split or several.

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
        rows += [(split, metrics[split]), ("  chance", metrics["chance"][split])]
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
    width = 7 * len(RECALL_AT)
    lines = [
        f"{'':<12}{'image to text':>{width}}{'text to image':>{width}}",
        f"{'':<12}" + "".join(f"{f'R@{k}':>7}" for k in RECALL_AT) * 2 + f"{'Rsum':>9}",
    ]
    for label, values in table_rows(metrics):
        lines.append(f"{label:<12}" + "".join(f"{values[key]:7.1f}" for key in RECALL_KEYS) + f"{values['rsum']:9.1f}")
    return "\n".join(lines)

"""Logits and labels -> accuracy and cross-entropy, their level of chance, and the table of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from eval.tables import table_rows


def accuracy_metrics(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Top-1 accuracy (percent) and mean cross-entropy (nats).

    Args:
        logits: ``(n, C)``, one row an image.
        labels: ``(n,)`` integers in 0..C-1.

    Returns:
        {"accuracy": ..., "cross_entropy": ...}. A tie for the largest logit counts as its share: k classes tied with
        the right one among them are a hit of 1/k, so that a constant output scores at chance.

    Raises:
        ValueError: for other shapes, labels out of range, or logits that are not finite.
    """
    logits, labels = np.asarray(logits, dtype=np.float64), np.asarray(labels)
    if logits.ndim != 2 or not logits.size or labels.shape != logits.shape[:1]:
        raise ValueError(f"expected logits (n, C) and labels (n,); received {logits.shape} and {labels.shape}")
    if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise ValueError(f"labels: expected integers in 0..{logits.shape[1] - 1}; received {np.unique(labels)}")
    if not np.isfinite(logits).all():
        raise ValueError("logits hold values that are not finite: training diverged; lower the learning rate")
    right = logits[np.arange(len(labels)), labels]
    greatest = logits.max(axis=1)
    hits = (right == greatest) / (logits == greatest[:, None]).sum(axis=1)
    log_sum = greatest + np.log(np.exp(logits - greatest[:, None]).sum(axis=1))
    return {"accuracy": 100 * float(hits.mean()), "cross_entropy": float((log_sum - right).mean())}


def chance_accuracy(classes: int) -> dict[str, float]:
    """The metrics of a uniform guess among `classes`."""
    return {"accuracy": 100 / classes, "cross_entropy": math.log(classes)}


def render_accuracy(metrics: Mapping[str, Any]) -> str:
    """One line a split, each followed by the level of chance.

                      accuracy  cross-entropy
        validation        95.0          0.180
          chance          10.0          2.303

    Args:
        metrics: as in `eval.tables.table_rows`.
    """
    rows = table_rows(metrics)
    width = max(12, *(len(label) for label, _ in rows))
    lines = [f"{'':<{width}}{'accuracy':>10}{'cross-entropy':>15}"]
    for label, values in rows:
        lines.append(f"{label:<{width}}{values['accuracy']:10.1f}{values['cross_entropy']:15.3f}")
    return "\n".join(lines)

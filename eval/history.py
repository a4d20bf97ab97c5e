"""The training log -> curves: the stages of a run laid one after the other on one axis of epochs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class StageSpan:
    """A stage's place on the common axis, in epochs since the start of the run."""

    name: str
    start: float
    end: float


@dataclass(frozen=True)
class History:
    """Curves of a run; each is (epochs since the start of the run, values).

    Attributes:
        stages: in order; a stage starts where the one before it ends.
        losses: part of the loss -> its curve, already weighted, so that the parts sum to the loss.
        validation: key of `retrieval_metrics` -> its curve.
    """

    stages: list[StageSpan]
    losses: dict[str, tuple[list[float], list[float]]]
    validation: dict[str, tuple[list[float], list[float]]]


def read_history(log: Iterable[Mapping[str, Any]]) -> History:
    """Collect the curves of a log whose epochs start again in each stage.

    Args:
        log: lines with "stage", "epoch" and either "loss" and "parts" (training) or "validation".
    """
    stages: list[StageSpan] = []
    losses: dict[str, tuple[list[float], list[float]]] = {}
    validation: dict[str, tuple[list[float], list[float]]] = {}
    for line in log:
        if not stages or stages[-1].name != line["stage"]:
            start = stages[-1].end if stages else 0.0
            stages.append(StageSpan(line["stage"], start, start))
        stage = stages[-1]
        epoch = stage.start + line["epoch"]
        stages[-1] = StageSpan(stage.name, stage.start, max(stage.end, epoch))
        if "validation" in line:
            curves, values = validation, line["validation"]
        else:
            curves, values = losses, line.get("parts") or {"loss": line["loss"]}
        for name, value in values.items():
            epochs, curve = curves.setdefault(name, ([], []))
            epochs.append(epoch)
            curve.append(value)
    return History(stages, losses, validation)

"""A run's folder -> its contents, checked: everything a report is made from, and nothing else."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.metrics import DIRECTIONS, RECALL_KEYS
from eval.tables import SPLITS

TABLE_KEYS = (*RECALL_KEYS, *(f"{direction}_MedR" for direction in DIRECTIONS), "rsum")
RUN_KEYS = (
    *("command", "seed", "git_commit", "versions", "data", "model", "adapter", "regularizer", "selection"),
    *("preprocessing", "threads", "precision", "trained_parameters", "total_parameters", "seconds"),
)


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """What a finished run left behind. An optional file that is missing is None, and the report says so.

    Attributes:
        path: the folder.
        run: run.json, provenance; has all of RUN_KEYS.
        metrics: metrics.json; "test" and perhaps "validation", "chance" for each, and perhaps "redundancy".
        config: config.yaml as text.
        log: log.jsonl, one dict a line.
        redundancy: redundancy.json, {"before": {layer: (r, r)}, "after": {...}}.
        retrieved: retrieved.json, {"k": int, "queries": [...]}.
    """

    path: Path
    run: dict[str, Any]
    metrics: dict[str, Any]
    config: str | None
    log: list[dict[str, Any]] | None
    redundancy: dict[str, Any] | None
    retrieved: dict[str, Any] | None


def read_run(path: Path) -> FinishedRun:
    """Read a run folder.

    Raises:
        FileNotFoundError: if run.json or metrics.json is missing.
        ValueError: if a file is not JSON, or lacks a key that the report needs.
    """
    for name in ("run.json", "metrics.json"):
        if not (path / name).is_file():
            raise FileNotFoundError(
                f"{path} has no {name}, so it is not the folder of a finished run; "
                "launch the same command again to finish it, or name the folder that holds run.json and metrics.json"
            )
    run, metrics = _json(path / "run.json"), _json(path / "metrics.json")
    _require(run, RUN_KEYS, "run.json")
    _require(metrics, ("test", "chance"), "metrics.json")
    for split in (name for name in SPLITS if name in metrics):
        _require(metrics[split], TABLE_KEYS, f"metrics.json, {split}")
        _require(metrics["chance"].get(split, {}), TABLE_KEYS, f"metrics.json, chance of {split}")
    config, log = path / "config.yaml", path / "log.jsonl"
    return FinishedRun(
        path=path,
        run=run,
        metrics=metrics,
        config=config.read_text(encoding="utf-8") if config.is_file() else None,
        log=_json_lines(log) if log.is_file() else None,
        redundancy=_json(path / "redundancy.json") if (path / "redundancy.json").is_file() else None,
        retrieved=_json(path / "retrieved.json") if (path / "retrieved.json").is_file() else None,
    )


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not valid JSON ({error}); run the evaluation again to write it") from error


def _json_lines(file: Path) -> list[dict[str, Any]]:
    records = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}, line {number}: not JSON ({error}); delete the line if it was cut off") from error
    return records


def _require(content: dict[str, Any], keys: tuple[str, ...], where: str) -> None:
    missing = [key for key in keys if key not in content]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}; it was written by another version, or by hand")

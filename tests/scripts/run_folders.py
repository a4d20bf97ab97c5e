"""Fabricated run folders with real configurations, and the table that is made of them."""

from __future__ import annotations

import copy
import functools
import json
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))  # as for `python scripts/results_table.py`

import results_table
from command_line import compose

from eval.metrics import RECALL_KEYS


@functools.cache
def composed(command: str, *overrides: str) -> dict[str, Any]:
    return compose(command, list(overrides))


class Runs:
    """Writes run folders, each in a place of its own below one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0

    def write(
        self, command: str, *overrides: str, score: float | None, seed: int = 0, run: dict[str, Any] | None = None,
        metrics: dict[str, Any] | None = None, **settings: Any,
    ) -> Path:  # fmt: skip
        """A run whose test accuracy, or each of its recalls, is `score`; None for one that has not finished.

        `settings`: keys of the configuration, with __ for a dot; run: more of run.json, metrics: of metrics.json.
        """
        config = copy.deepcopy(composed(command, *overrides))
        if config["data"].get("subset_seed") == config["seed"]:
            config["data"]["subset_seed"] = seed
        config["seed"] = seed
        for key, value in settings.items():
            *above, last = key.split("__")
            functools.reduce(dict.__getitem__, above, config)[last] = value
        self.count += 1
        path = self.folder / f"run{self.count:03d}"
        path.mkdir(parents=True)
        (path / "config.yaml").write_text(yaml.safe_dump(config))
        data = {"name": config["data"]["name"], "fingerprint": "f" * 64}
        described = {
            "precision": "float32",
            "selection": "the last epoch of each stage",
            "data": data,
            "batch_size": 32,
        }
        (path / "run.json").write_text(json.dumps(described | (run or {})))
        if score is not None:
            recalls = dict.fromkeys(RECALL_KEYS, score) | {"rsum": 6 * score}
            test = recalls if command == "train_retrieval" else {"accuracy": score}
            (path / "metrics.json").write_text(json.dumps({"test": test} | (metrics or {})))
        return path


def table_of(runs: Runs) -> pd.DataFrame:
    results_table.main([runs.folder], runs.folder / "table.csv")
    return pd.read_csv(runs.folder / "table.csv", na_filter=True, keep_default_na=False, na_values=[""])

"""A finished run's folder, small and made up, for the tests of its report."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eval import chance_level

CAPTION = "two <script>alert('cats')</script> & a dog"


def _metrics(level: float) -> dict[str, float]:
    recalls = {f"{d}_R@{k}": level + k for d in ("i2t", "t2i") for k in (1, 5, 10)}
    ranks = {f"{d}_{m}": 4.5 for d in ("i2t", "t2i") for m in ("MedR", "MeanR")}
    return {**recalls, **ranks, "rsum": sum(recalls.values())}


def _log(epochs: int) -> list[dict]:
    lines = []
    for stage, parts in (("adapt", ("info_nce",)), ("regularize", ("info_nce", "resora_linear"))):
        for step in range(1, 4 * epochs + 1):
            values = {part: 3.0 / (1 + step) * (0.1 if part == "resora_linear" else 1) for part in parts}
            line = {"stage": stage, "epoch": step / 4, "step": step, "learning_rate": 2e-3}
            lines.append({**line, "loss": sum(values.values()), "parts": values})
            if step % 4 == 0:
                lines.append({"stage": stage, "epoch": step / 4, "step": step, "validation": _metrics(10 + step)})
    return lines


def write_run(folder: Path, *, layers: int = 3, rank: int = 4, epochs: int = 2, queries: int = 2) -> Path:
    """Write every file of a finished run: query 0 finds its image second, item 5 is a clip, item 9 has no picture."""
    rng = np.random.default_rng(0)
    owners = np.repeat(np.arange(20), 5)
    run = {
        "command": "python scripts/train_retrieval.py data=openmoji adapter=lora regularizer=linear seed=0",
        "seed": 0,
        "git_commit": None,
        "versions": {"python": "3.11.7", "torch": "2.8.0"},
        "data": {
            "name": "openmoji",
            "fingerprint": "5f1c9a",
            "images": {"train": 100, "validation": 20, "test": 20},
            "captions": {"train": 500, "validation": 100, "test": 100},
        },
        "model": "vse_infty",
        "adapter": "lora (rank 8, q and v)",
        "regularizer": "linear (weight 0.01)",
        "selection": "last epoch",
        "preprocessing": "72 px, white ground",
        "threads": 2,
        "precision": "bfloat16",
        "trained_parameters": 147_456,
        "total_parameters": 22_713_216,
        "seconds": {"load": 2.31, "adapt": 185.2, "regularize": 92.0, "evaluate": 9.4},
    }
    chance = chance_level(owners, 20)
    metrics = {
        "validation": _metrics(31.3),
        "test": _metrics(28.2),
        "chance": {"validation": chance, "test": chance},
        "redundancy": {"before": 0.4321, "after": 0.0876},
    }
    names = [f"encoder.layer.{i}.attention.{q}" for i in range((layers + 1) // 2) for q in ("query", "value")][:layers]
    matrices: dict[str, dict] = {"before": {}, "after": {}}
    for number, name in enumerate(names):
        for moment, strength in (("before", 0.3 + 0.4 * (number == 1)), ("after", 0.1)):
            half = np.triu(strength * rng.uniform(0.5, 1, size=(rank, rank)), 1)
            matrices[moment][name] = (half + half.T + np.eye(rank)).tolist()
    results = [{"item": item, "score": 0.9 - 0.05 * i, "right": False} for i, item in enumerate((17, 3, 5, 9, 0))]
    shown = [{"direction": "t2i", "query": CAPTION, "results": [{**r, "right": r["item"] == 3} for r in results]}]
    shown += [{"direction": "t2i", "query": f"caption {n}", "results": results} for n in range(1, queries)]
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in {
        "run": run, "metrics": metrics, "redundancy": matrices, "retrieved": {"k": 5, "queries": shown}
    }.items():  # fmt: skip
        (folder / f"{name}.json").write_text(json.dumps(content))
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in _log(epochs)))
    (folder / "config.yaml").write_text("seed: 0\nadapter:\n  rank: 8\n")
    (folder / "thumbnails").mkdir(exist_ok=True)
    for name in ("17", "3", "0", "5_0", "5_1", "5_2", "5_3"):
        colour = tuple(int(c) for c in rng.integers(60, 240, size=3))
        Image.new("RGB", (72, 72), colour).save(folder / "thumbnails" / f"{name}.png")
    return folder


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder to read."""
    return write_run(tmp_path_factory.mktemp("runs") / "seed0")


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run's folder to change."""
    return write_run(tmp_path / "seed0")

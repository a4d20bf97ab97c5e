"""Evaluate a finished run again, from its adapter file: R@K both ways and Rsum of one split, or its accuracy.

python scripts/evaluate.py run=runs/retrieval/openmoji/vse_infty/lora/linear/seed0
python scripts/evaluate.py run=runs/retrieval/openmoji/vse_infty/lora/none/seed0 split=validation output=metrics.json
python scripts/evaluate.py run=runs/retrieval/flickr30k/vse_infty/lora/none/seed0 root=/where/the/data/are/now
python scripts/evaluate.py run=runs/retrieval/coco/vse_infty/lora/none/seed0 folds=5    # COCO's 1K numbers too
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from command_line import launch

from retrieval.data import DATASETS, SPLITS


def main(config: dict[str, Any]) -> None:
    from training import RunFolder  # here, as below: it takes seconds, which --help should not

    folder, split = Path(config["run"]), config["split"]
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; expected one of {', '.join(SPLITS)}")
    described = RunFolder(folder).read_json("run.json")  # computed as the run did, so that the numbers are the same
    if described is None or not (folder / "config.yaml").is_file():
        raise FileNotFoundError(
            f"run={folder} holds no run.json and config.yaml: expected the folder of a finished run"
        )
    if config["output"] and not Path(config["output"]).resolve().parent.is_dir():
        raise FileNotFoundError(f"output={config['output']}: its folder does not exist")
    folds, embeddings = config["folds"], config["embeddings"]
    if folds is not None and (type(folds) is not int or folds < 1):
        raise ValueError(f"folds is {folds!r}; expected a whole number, 1 or more, or null")
    torch.set_num_threads(described["threads"])
    if described["data"]["name"] in DATASETS:
        metrics = _retrieval(folder, config["root"], split, folds, Path(embeddings) if embeddings else None)
    elif folds or embeddings:
        raise ValueError(f"folds and embeddings are of retrieval, and run={folder} is none; leave them null")
    else:
        metrics = _classification(folder, config["root"], split, described["precision"])
    print(f"Model selected by: {described['selection']}")
    if config["output"]:
        Path(config["output"]).write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")


def _retrieval(
    folder: Path, root: str | None, split: str, folds: int | None, embeddings: Path | None
) -> dict[str, Any]:
    """Print the table of a split, and return its numbers; with `folds`, means over them as well."""
    from eval import chance_level
    from eval.folds import fold_metrics
    from eval.tables import render_rows, table_rows
    from retrieval.assemble import restore
    from retrieval.evaluate import encode

    splits, model, captions = restore(folder, root)
    if model.pair_scores is not None and (folds or embeddings):
        raise ValueError(f"the model of run={folder} scores pairs and has no embeddings; leave both of them null")
    data = splits[split]
    encoded, owners = encode(model, data, captions[split]), data.image_of_caption
    if embeddings:
        embeddings.mkdir(parents=True, exist_ok=True)
        for name, array in (("images", encoded.images), ("texts", encoded.texts), ("owners", owners)):
            np.save(embeddings / f"{name}.npy", array)
    metrics: dict[str, Any] = {
        **_validation_is(folder),
        split: encoded.metrics(owners),
        "chance": {split: chance_level(owners, len(data))},
    }
    rows = table_rows(metrics)
    if folds:
        means, chance = fold_metrics(encoded.images, encoded.texts, owners, folds)
        metrics["folds"] = {"number": folds, split: means, "chance": {split: chance}}
        rows += [(f"mean of {folds} folds", means), ("  chance", chance)]
    print(render_rows(rows))
    return metrics


def _classification(folder: Path, root: str | None, split: str, precision: str) -> dict[str, Any]:
    """As `_retrieval`; raises ValueError where the split has no images."""
    from classification.assemble import restore
    from classification.evaluate import evaluate
    from eval import chance_accuracy, render_accuracy

    data, splits, model = restore(folder, root)
    if not len(splits[split]):
        there = ", ".join(name for name in SPLITS if len(splits[name]))
        raise ValueError(f"split={split} of run={folder} has no images; it has {there}")
    metrics = {
        **_validation_is(folder),
        split: evaluate(model, splits[split], precision=precision),
        "chance": {split: chance_accuracy(len(data.classes))},
    }
    print(render_accuracy(metrics))
    return metrics


def _validation_is(folder: Path) -> dict[str, Any]:
    """What the run noted if it validated on the test split, for the table to say so too."""
    from training import RunFolder

    noted = RunFolder(folder).read_json("metrics.json") or {}
    return {key: noted[key] for key in ("validation_is",) if key in noted}


if __name__ == "__main__":
    launch(main, "evaluate", __doc__ or "")

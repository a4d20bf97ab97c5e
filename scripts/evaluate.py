"""Evaluate a finished run again, from its adapter file: R@K both ways and Rsum of one split, or its accuracy.

python scripts/evaluate.py run=runs/retrieval/openmoji/vse_infty/lora/linear/seed0
python scripts/evaluate.py run=runs/retrieval/openmoji/vse_infty/lora/none/seed0 split=validation output=metrics.json
python scripts/evaluate.py run=runs/retrieval/flickr30k/vse_infty/lora/none/seed0 root=/where/the/data/are/now
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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
    torch.set_num_threads(described["threads"])
    if described["data"]["name"] in DATASETS:
        metrics = _retrieval(folder, config["root"], split)
    else:
        metrics = _classification(folder, config["root"], split, described["precision"])
    if config["output"]:
        Path(config["output"]).write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")


def _retrieval(folder: Path, root: str | None, split: str) -> dict[str, Any]:
    """Print the table of a split, and return its numbers."""
    from eval import chance_level, render_table
    from retrieval.assemble import restore
    from retrieval.evaluate import evaluate

    splits, model, captions = restore(folder, root)
    data = splits[split]
    metrics = {
        split: evaluate(model, data, captions[split]),
        "chance": {split: chance_level(data.image_of_caption, len(data))},
    }
    print(render_table(metrics))
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
        split: evaluate(model, splits[split], precision=precision),
        "chance": {split: chance_accuracy(len(data.classes))},
    }
    print(render_accuracy(metrics))
    return metrics


if __name__ == "__main__":
    launch(main, "evaluate", __doc__ or "")

"""Evaluate a finished run again, from its adapter file: Recall@K both ways and Rsum of one split.

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
    from eval import chance_level, render_table  # here: these take seconds, which --help should not
    from retrieval.assemble import restore
    from retrieval.evaluate import evaluate
    from training import RunFolder

    folder, split = Path(config["run"]), config["split"]
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; expected one of {', '.join(SPLITS)}")
    described = RunFolder(folder).read_json("run.json")  # computed as the run did, so that the numbers are the same
    if described is None or not (folder / "config.yaml").is_file():
        raise FileNotFoundError(
            f"run={folder} holds no run.json and config.yaml: expected the folder of a finished run"
        )
    if (name := described["data"]["name"]) not in DATASETS:
        raise ValueError(
            f"run={folder} is a run on {name}, which is no retrieval data; the accuracy of a classification run is in "
            "its metrics.json"
        )
    if config["output"] and not Path(config["output"]).resolve().parent.is_dir():
        raise FileNotFoundError(f"output={config['output']}: its folder does not exist")
    splits, model, captions = restore(folder, config["root"])
    torch.set_num_threads(described["threads"])
    data = splits[split]
    metrics = {
        split: evaluate(model, data, captions[split]),
        "chance": {split: chance_level(data.image_of_caption, len(data))},
    }
    print(render_table(metrics))
    if config["output"]:
        Path(config["output"]).write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    launch(main, "evaluate", __doc__ or "")

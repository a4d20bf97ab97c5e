"""Evaluate a finished run again, from its adapter file: Recall@K both ways, median rank and Rsum of one split.

    python scripts/evaluate.py run=runs/retrieval/openmoji/vse_infty/lora/linear/seed0
    python scripts/evaluate.py run=runs/retrieval/openmoji/vse_infty/lora/none/seed0 split=validation output=metrics.json
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from command_line import launch

from eval import render_table
from retrieval.evaluate import evaluate_run


def main(config: dict[str, Any]) -> None:
    metrics = {config["split"]: evaluate_run(Path(config["run"]), config["split"])}
    print(render_table(metrics))
    if config["output"]:
        Path(config["output"]).write_text(json.dumps(metrics, indent=1) + "\n")


if __name__ == "__main__":
    launch(main, "evaluate", __doc__ or "")

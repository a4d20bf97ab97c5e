"""Fetch the embedded encoders and make an embedded data set; what is there already is left alone.

python scripts/prepare_data.py data=openmoji
python scripts/prepare_data.py data=openmoji_clips root=/data/resora
"""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from command_line import launch

from retrieval.data import DATASETS
from training import choose_hardware


def main(config: dict[str, Any]) -> None:
    torch.set_num_threads(choose_hardware(precision="float32").threads)
    root, start = Path(config["root"]), perf_counter()
    DATASETS[config["data"]["name"]].prepare(root, root / "cache", **config["data"]["prepare"])
    print(f"data ready in {root / config['data']['name']} ({perf_counter() - start:.0f} s)")


if __name__ == "__main__":
    launch(main, "prepare_data", __doc__ or "", choices={"data": DATASETS})

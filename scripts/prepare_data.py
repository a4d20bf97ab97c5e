"""Make a data set ready for training, or say what is wrong with it; what is there already is left alone.

An embedded data set is made, with its encoders fetched; of videos the frames are decoded and kept on the disk:

    python scripts/prepare_data.py data=openmoji
    python scripts/prepare_data.py data=msrvtt root=/data/resora data.prepare.workers=8

`verify` counts items and sentences, beside the published numbers, and looks into the files: it opens every picture of
openmoji, the index of every video, and the region features of 256 images a split of flickr30k and coco. decode=true
decodes the frames that are kept, and reads the features of every image. It ends with exit code 1 if something is wrong:

    python scripts/prepare_data.py verify data=openmoji_clips
    python scripts/prepare_data.py verify data=msrvtt root=/data/resora decode=true
"""

from __future__ import annotations

import sys
from pathlib import Path
from time import perf_counter
from typing import Any

# More is imported in the functions: each process that reads videos imports this file too.


def main(config: dict[str, Any]) -> None:
    import torch

    from retrieval.data import DATASETS
    from training import choose_hardware

    torch.set_num_threads(choose_hardware(precision="float32").threads)
    root, start = Path(config["root"]), perf_counter()
    DATASETS[config["data"]["name"]].prepare(root, root / "cache", **config["data"]["prepare"])
    print(f"data ready in {root / config['data']['name']} ({perf_counter() - start:.0f} s)")


def verify(config: dict[str, Any]) -> None:
    from retrieval.data import DATASETS

    prepare = config["data"]["prepare"]
    options = {key: value for key, value in config["data"].items() if key not in ("name", "prepare")}
    options |= {key: prepare[key] for key in ("workers", "time_limit") if key in prepare}
    if config["decode"]:
        options["decode"] = True
    result = DATASETS[config["data"]["name"]].verify(Path(config["root"]), **options)
    print(result.text())
    if result.problems:
        sys.exit(1)


if __name__ == "__main__":
    from command_line import launch

    from retrieval.data import DATASETS

    launch(main, "prepare_data", __doc__ or "", choices={"data": DATASETS}, words={"verify": verify})

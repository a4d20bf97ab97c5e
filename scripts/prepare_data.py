"""Make a data set ready for training, or say what is wrong with it; what is there already is left alone.

An embedded data set is made, with its encoders fetched; of videos the frames are decoded and kept on the disk:

    python scripts/prepare_data.py data=openmoji
    python scripts/prepare_data.py data=msrvtt root=/data/resora data.prepare.workers=8

Of what only you can bring (flickr30k, coco, msrvtt; vtab and few_shot for classification), it says what to get and
where to put it, as long as it is not there:

    python scripts/prepare_data.py data=vtab

`verify` counts items and sentences, beside the published numbers, and looks into the files: it opens every picture of
openmoji, the index of every video, the region features of 256 images a split of flickr30k and coco, and 64 images of
every list of vtab and few_shot. decode=true decodes the frames that are kept, and reads the features of every image and
every image of the lists. It ends with exit code 1 if something is wrong:

    python scripts/prepare_data.py verify data=openmoji_clips
    python scripts/prepare_data.py verify data=msrvtt root=/data/resora decode=true
    python scripts/prepare_data.py verify data=vtab 'data.prepare.datasets=[cifar,dtd]'
"""

from __future__ import annotations

import sys
from pathlib import Path
from time import perf_counter
from typing import Any

# More is imported in the functions: each process that reads videos imports this file too.


def datasets() -> dict[str, Any]:
    """The data sets of both tasks that there is something to prepare of."""
    from classification.data import DATASETS as CLASSIFICATION
    from retrieval.data import DATASETS as RETRIEVAL

    return RETRIEVAL | {name: kind for name, kind in CLASSIFICATION.items() if hasattr(kind, "prepare")}


def main(config: dict[str, Any]) -> None:
    import torch

    from training import choose_hardware

    torch.set_num_threads(choose_hardware(precision="float32").threads)
    root, start, kind = Path(config["root"]), perf_counter(), datasets()[config["data"]["name"]]
    kind.prepare(root, root / "cache", **config["data"]["prepare"])
    print(f"data ready in {root / getattr(kind, 'folder_name', kind.name)} ({perf_counter() - start:.0f} s)")


def verify(config: dict[str, Any]) -> None:
    from retrieval.data import DATASETS as RETRIEVAL

    name, prepare = config["data"]["name"], config["data"]["prepare"]
    if name in RETRIEVAL:
        options = {key: value for key, value in config["data"].items() if key not in ("name", "prepare")}
        options |= {key: prepare[key] for key in ("workers", "time_limit") if key in prepare}
    else:
        options = dict(prepare)  # all of its data sets, whichever one a training would take
    if config["decode"]:
        options["decode"] = True
    result = datasets()[name].verify(Path(config["root"]), **options)
    print(result.text())
    if result.problems:
        sys.exit(1)


if __name__ == "__main__":
    from command_line import launch

    launch(main, "prepare_data", __doc__ or "", choices={"data": datasets()}, words={"verify": verify})

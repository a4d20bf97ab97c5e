"""Fine-tune a classification model and evaluate it: one run folder with the adapter and the metrics.

    python scripts/train_classification.py data=digits model=dinov2_small adapter=lora regularizer=linear seed=0
    python scripts/train_classification.py data.train_images=400 adapter=linear regularizer=none

VTAB-1K and few-shot sets on ViT-B/16, once they are there (`python scripts/prepare_data.py data=vtab` says how):

    python scripts/train_classification.py data=vtab data.dataset=cifar model=vit_b16 adapter=lora regularizer=linear
    python scripts/train_classification.py data=few_shot data.dataset=oxford-pets data.shots=4 model=vit_b16

Rows of the paper's Tables 2 and 3, and curves of its Figure 3 (scripts/conf/table2, table3, figure3):

    python scripts/train_classification.py table2=lora_resora data.dataset=cifar
    python scripts/train_classification.py figure3=lora_resora data.dataset=oxford-pets data.shots=4

A sweep, one run folder each; a job that fails ends no other, and the list of them comes last:

    python scripts/train_classification.py --multirun regularizer=none,linear seed=0,1,2

A finished run is not repeated, a killed one goes on from its last epoch when it is launched again.
"""

from __future__ import annotations

from typing import Any

from command_line import launch
from summary import print_summary

from classification.data import DATASETS
from classification.models import MODELS
from eval import render_accuracy


def main(config: dict[str, Any]) -> None:
    from classification.train import train  # here: it takes seconds, which --help should not

    run = train(config)
    print_summary(run, render_accuracy, f"run                 {run.path}")


def check(config: dict[str, Any]) -> None:
    from classification.experiment import Experiment

    Experiment.of(config)


if __name__ == "__main__":
    launch(
        main,
        "train_classification",
        __doc__ or "",
        choices={"data": DATASETS, "model": MODELS, "trainer": DATASETS},
        check=check,
    )

"""Fine-tune a retrieval model and evaluate it: one run folder with the adapter, the metrics and a report.

    python scripts/train_retrieval.py data=openmoji model=vse_infty adapter=lora regularizer=linear seed=0
    python scripts/train_retrieval.py data=openmoji_clips model=clip4clip adapter.rank=4 trainer.batch_size=32

Flickr30K as VSE-infinity has it, once its files are there (`python scripts/prepare_data.py data=flickr30k` says how);
protocol=as_published has the published code's mistakes back:

    python scripts/train_retrieval.py data=flickr30k model=vse_infty_base loss=triplet protocol=as_published

Rows of the paper's Table 1, for Flickr30K and MSR-VTT (scripts/conf/table1):

    python scripts/train_retrieval.py table1=msrvtt_lora_resora

A sweep, one run folder each; a job that fails ends no other, and the list of them comes last:

    python scripts/train_retrieval.py --multirun regularizer=none,linear seed=0,1,2

A finished run is not repeated, a killed one goes on from its last epoch when it is launched again.
"""

from __future__ import annotations

from typing import Any

from command_line import launch
from summary import print_summary

from eval import render_table
from retrieval.data import DATASETS
from retrieval.models import MODELS


def main(config: dict[str, Any]) -> None:
    from retrieval.train import train  # here: it takes seconds, which --help should not

    run = train(config)
    print_summary(run, render_table, f"report              {run.path / 'report.html'}")


def check(config: dict[str, Any]) -> None:
    from retrieval.experiment import Experiment

    Experiment.of(config)


if __name__ == "__main__":
    launch(
        main,
        "train_retrieval",
        __doc__ or "",
        choices={"data": DATASETS, "model": MODELS, "trainer": DATASETS},
        check=check,
    )

"""Fine-tune a retrieval model and evaluate it: one run folder with the adapter, the metrics and a report.

    python scripts/train_retrieval.py data=openmoji model=vse_infty adapter=lora regularizer=linear seed=0
    python scripts/train_retrieval.py data=openmoji_clips model=clip4clip adapter.rank=4 trainer.batch_size=32

A sweep, one run folder each:

    python scripts/train_retrieval.py --multirun regularizer=none,linear seed=0,1,2

A finished run is not repeated, a killed one goes on from its last epoch when it is launched again.
"""

from __future__ import annotations

from typing import Any

from command_line import launch

from eval import render_table
from retrieval.train import train


def main(config: dict[str, Any]) -> None:
    run = train(config)
    metrics, described = run.read_json("metrics.json"), run.read_json("run.json")
    trained, total = described["trained_parameters"], described["total_parameters"]
    print(f"\n{render_table(metrics)}\n")
    print(f"parameters trained  {trained:,} of {total:,} ({100 * trained / total:.1f} %),")
    print(f"                    {described['adapter_parameters']:,} of them in the adapter")
    if redundancy := metrics.get("redundancy"):
        print(f"mean redundancy     {redundancy['before']:.3f} after the first stage")
        print(f"                    {redundancy['after']:.3f} at the end")
    print(
        "time                " + ", ".join(f"{part} {seconds:.0f} s" for part, seconds in described["seconds"].items())
    )
    print(f"report              {run.path / 'report.html'}")


if __name__ == "__main__":
    launch(main, "train_retrieval", __doc__ or "")

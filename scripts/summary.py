"""What a training command prints when its run is finished, from the files of the run's folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from training.run import RunFolder, is_first_process


def print_summary(run: RunFolder, render: Callable[[Mapping[str, Any]], str], place: str) -> None:
    """The table, what trained, redundancy before and after, seconds, and where to look; once for all processes.

    Args:
        run: a finished run.
        render: the content of metrics.json -> the task's table.
        place: the last line, "report <path>" say.
    """
    if not is_first_process():
        return
    metrics, described = run.read_json("metrics.json"), run.read_json("run.json")
    trained, total = described["trained_parameters"], described["total_parameters"]
    print(f"\n{render(metrics)}\n")
    print(f"parameters trained  {trained:,} of {total:,} ({100 * trained / total:.1f} %),")
    print(f"                    {described['adapter_parameters']:,} of them in the adapter")
    if redundancy := metrics.get("redundancy"):
        print(f"mean redundancy     {redundancy['before']:.3f} after the first stage")
        print(f"                    {redundancy['after']:.3f} at the end")
    seconds = ", ".join(f"{part} {spent:.0f} s" for part, spent in described["seconds"].items())
    print(f"time                {seconds}")
    print(place)

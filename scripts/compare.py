"""Does the regularizer help? Head only, LoRA, LoRA + each measure, full fine-tuning: paired seeds, equal epochs.

    python scripts/compare.py --jobs 2
    python scripts/compare.py --tasks digits scenes --jobs 2
    python scripts/compare.py --page-only

Runs what docs/results/runs.jsonl holds no line of yet, so that it can be stopped and launched again, and writes
docs/results.md from these lines. To repeat a result, delete its line and its run folder.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from comparison.execute import Records, run_task
from comparison.page import write_page
from comparison.plan import TASKS
from mistakes import mistakes_in_one_line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--runs", type=Path, default=Path("runs/compare"), help="where the run folders go")
    parser.add_argument("--output", type=Path, default=Path("docs"), help="where results.md and results/ go")
    parser.add_argument("--page-only", action="store_true", help="write the page from what has been run")
    arguments = parser.parse_args()
    with mistakes_in_one_line():
        records = Records(arguments.output / "results" / "runs.jsonl")
        for task in [] if arguments.page_only else arguments.tasks:
            run_task(task, records, arguments.runs, arguments.jobs)
            write_page(records, arguments.output)
        write_page(records, arguments.output)


if __name__ == "__main__":
    main()

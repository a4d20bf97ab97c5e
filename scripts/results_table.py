"""Tables over seeds from run folders: mean, standard deviation, and the paired difference to the row without penalty.

    python scripts/results_table.py                                  # all runs below runs/
    python scripts/results_table.py runs/rank4 runs/rank8 --csv table.csv

A table for each data set: R@K both ways and Rsum for retrieval; VTAB-1K as the paper's Table 2; few-shot with shots
as columns, and a table of the means over its five data sets (Figure 3); accuracy for the rest. A row is the mean over
runs that differ in nothing but the seed. Whatever else differs between rows (a rank, a weight, what was validated on)
stands in its column "settings": nothing is mixed. Where runs kept how their first stage scored, that is a row too,
with after=<stage>. A difference needs two seeds in common; p is of the paired t-test, after Holm's correction over the
table. Runs that are not finished or cannot be read are named.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
from mistakes import mistakes_in_one_line
from results.page import csv_rows, render
from results.rows import make_tables
from results.runs import read_results


def main(runs: list[Path], csv: Path | None) -> None:
    results, left_out = read_results(runs)
    tables, twice = make_tables(results)
    print(render(tables, left_out | twice))
    if not tables:
        raise ValueError(f"no finished run below {', '.join(map(str, runs))}, so there is no table")
    if csv:
        pd.DataFrame(csv_rows(tables)).to_csv(csv, index=False)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="*", default=[Path("runs")], help="run folders, or folders of them")
    parser.add_argument("--csv", type=Path, help="write all rows there as well, with a deviation for each score")
    given = parser.parse_args()
    with mistakes_in_one_line():
        main(given.runs, given.csv)

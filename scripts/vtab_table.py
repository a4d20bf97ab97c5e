"""The table of VTAB-1K, as the paper's Table 2, from the folders of finished runs.

    python scripts/vtab_table.py
    python scripts/vtab_table.py runs/rank4 --csv table.csv

A row is a model, an adapter and a regularizer; an accuracy is the mean over the seeds that have run, on the test split.
"Average" is the mean of the three groups' means, "All" that of the 19 data sets; both stay empty until all have run.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
from mistakes import mistakes_in_one_line

import classification  # noqa: F401  (before timm)
from classification.data.vtab import GROUPS, VTAB_1K
from eval.vtab import vtab_averages
from training import RunFolder

AVERAGES = {**{group: group.capitalize() for group in GROUPS}, "average": "Average", "all": "All"}
KEYS = ["model", "adapter", "regularizer"]


def main(runs: Path, csv: Path | None) -> None:
    table = tabulate(accuracies(runs))
    if csv:
        table.to_csv(csv)
    print(table.to_string(float_format="{:.1f}".format, na_rep="-"))


def accuracies(runs: Path) -> pd.DataFrame:
    """model, adapter, regularizer, seed, dataset and accuracy (percent) of each finished run below a folder.

    Raises:
        FileNotFoundError: there is none.
    """
    found = []
    for path in sorted((runs / "classification").glob("vtab-*/*/*/*/seed*/metrics.json")):
        dataset, model, adapter, regularizer, seed = path.parent.relative_to(runs / "classification").parts
        accuracy = RunFolder(path.parent).read_json(path.name)["test"]["accuracy"]
        found.append((model, adapter, regularizer, seed, dataset.removeprefix("vtab-"), accuracy))
    if not found:
        raise FileNotFoundError(
            f"{runs} holds no finished run of VTAB-1K; `python scripts/train_classification.py data=vtab --multirun "
            "data.dataset=cifar,caltech101` trains two"
        )
    return pd.DataFrame(found, columns=[*KEYS, "seed", "dataset", "accuracy"])


def tabulate(runs: pd.DataFrame) -> pd.DataFrame:
    """One row for each model, adapter and regularizer: seeds, the 19 accuracies, the averages.

    "seeds" is the number of them, or "1 to 3" where data sets have different numbers.
    """
    rows = {}
    for key, group in runs.groupby(KEYS, sort=True):
        seeds = group.groupby("dataset")["seed"].nunique()
        means = group.groupby("dataset")["accuracy"].mean().to_dict()
        fewest, most = seeds.min(), seeds.max()
        averages = vtab_averages(means, GROUPS)
        rows[key] = {
            "seeds": f"{most}" if fewest == most else f"{fewest} to {most}",
            **{name: means.get(name) for name in VTAB_1K},
            **{column: averages[name] for name, column in AVERAGES.items()},
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(KEYS)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="?", default=Path("runs"), help="the folder of the runs' folders")
    parser.add_argument("--csv", type=Path, help="write the table there as well")
    given = parser.parse_args()
    with mistakes_in_one_line():
        main(given.runs, given.csv)

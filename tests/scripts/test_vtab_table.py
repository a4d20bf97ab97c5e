"""The averages are those that the ReSoRA paper prints for its own numbers; rows come from runs' folders."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pandas as pd
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))  # as for `python scripts/vtab_table.py`

import vtab_table

from classification.data.vtab import GROUPS, VTAB_1K
from eval.vtab import vtab_averages

# Rows of Table 2: natural, specialized, structured; "Average" and "All Set Average".
TABLE_2 = {
    "LoRA": (
        "73.7 94.1 72.4 99.4 91.3 85.6 56.3  86.8 95.9 85.2 73.4  83.6 64.6 51.4 79.5 85.7 51.5 35.1 46.5", (76.5, 74.3)
    ),
    "DTL+": (
        "69.9 95.0 71.5 99.3 91.8 86.8 56.8  87.8 96.1 86.4 74.7  81.6 64.9 52.0 81.7 97.0 55.0 36.4 49.6", (77.5, 75.5)
    ),
    "LST": (
        "59.5 91.5 69.0 99.2 89.9 79.5 54.6  86.9 95.9 85.3 74.1  81.8 61.8 52.2 81.0 71.7 49.5 33.7 45.2", (74.3, 71.7)
    ),
}  # fmt: skip


def row(method: str) -> dict[str, float]:
    return dict(zip(VTAB_1K, map(float, TABLE_2[method][0].split()), strict=True))


@pytest.mark.parametrize("method", TABLE_2)
def test_the_papers_averages(method: str) -> None:
    averages = vtab_averages(row(method), GROUPS)
    assert (averages["average"], averages["all"]) == pytest.approx(TABLE_2[method][1], abs=0.06)


def test_a_mean_over_fewer_is_none() -> None:
    some = row("LoRA")
    del some["kitti"]
    averages = vtab_averages(some, GROUPS)
    assert averages["natural"] is not None and averages["structured"] is averages["average"] is averages["all"] is None
    with pytest.raises(ValueError, match="mnist is in none of the groups natural"):
        vtab_averages({"mnist": 99.0}, GROUPS)


def test_a_table_from_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for dataset, accuracy in row("LoRA").items():
        for seed in (0, 1) if dataset == "cifar" else (0,):
            folder = tmp_path / f"classification/vtab-{dataset}/vit_b16/lora/linear/seed{seed}"
            folder.mkdir(parents=True)
            (folder / "metrics.json").write_text(json.dumps({"test": {"accuracy": accuracy + seed}}))
    unfinished = tmp_path / "classification/vtab-dtd/vit_b16/lora/none/seed0"
    unfinished.mkdir(parents=True)
    vtab_table.main(tmp_path, tmp_path / "table.csv")
    table = pd.read_csv(tmp_path / "table.csv")
    assert len(table) == 1 and table.loc[0, "seeds"] == "1 to 2" and table.loc[0, "regularizer"] == "linear"
    assert table.loc[0, "cifar"] == pytest.approx(74.2) and table.loc[0, "dtd"] == pytest.approx(72.4)
    assert table.loc[0, "Average"] == pytest.approx(76.49, abs=0.05)
    assert "76.5" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="holds no finished run of VTAB-1K"):
        vtab_table.main(tmp_path / "classification", None)

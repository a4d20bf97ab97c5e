"""Tables from fabricated run folders with real configurations, against NumPy, SciPy and the paper's own averages."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from scipy import stats

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))  # as for `python scripts/results_table.py`
sys.path.insert(0, str(Path(__file__).parent))

import results_table
from run_folders import Runs, table_of

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


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path / "runs")


def test_means_deviations_and_paired_differences(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    without, linear, cosine = rng.normal([[60], [61], [60.2]], 0.5, (3, 4))
    for name, scores in (("none", without), ("linear", linear), ("cosine", cosine)):
        for seed, score in enumerate(scores):
            runs.write("train_retrieval", f"regularizer={name}", score=score, seed=seed)
    runs.write("train_retrieval", "regularizer=linear", score=99.0, seed=17)  # a seed that the others have not
    table = table_of(runs).set_index("regularizer")
    assert list(table.index) == ["none", "cosine", "linear"] and list(table["seeds"]) == [4, 4, 5]
    assert table.loc["none", "t2i_R@5"] == pytest.approx(without.mean())
    assert table.loc["none", "t2i_R@5 sd"] == pytest.approx(without.std(ddof=1))
    assert table.loc["linear", "rsum"] == pytest.approx(6 * np.mean([*linear, 99]))
    p = []
    for name, scores in (("cosine", cosine), ("linear", linear)):
        test = stats.ttest_rel(6 * scores, 6 * without)
        p.append(test.pvalue)
        assert table.loc[name, "difference"] == pytest.approx(6 * (scores - without).mean())
        assert tuple(table.loc[name, ["low", "high"]]) == pytest.approx(tuple(test.confidence_interval(0.95)))
        assert table.loc[name, "against"] == 1
    small, large = sorted(p)
    assert sorted(table["p"].dropna()) == pytest.approx([2 * small, max(large, 2 * small)])  # Holm
    printed = capsys.readouterr().out
    assert f"{6 * without.mean():.1f} ± {6 * without.std(ddof=1):.1f}" in printed and "hit rate" in printed
    assert f"{6 * (linear - without).mean():+.2f} [" in printed and "Holm over 2 difference" in printed
    grid = [line for line in printed.splitlines() if line.startswith("|")]
    assert len({len(line) for line in grid}) == 1 and len(grid) == 5


def test_whatever_differs_is_a_row_of_its_own_and_says_so(runs: Runs) -> None:
    def linear(score: float, **more: Any) -> None:
        runs.write("train_retrieval", score=score, **more)

    linear(50.0)
    linear(52.0, seed=1, runs="elsewhere", root="there", trainer__workers=3, trainer__threads=1, start_from="runs/x")
    linear(60.0, adapter__rank=4)
    linear(61.0, regularizer__weight=0.1)
    linear(62.0, trainer__selection="validation")
    linear(63.0, run={"precision": "bfloat16"})
    linear(64.0, run={"batch_size": 64})
    linear(65.0, run={"data": {"name": "openmoji", "fingerprint": "e" * 64}})
    table = table_of(runs).set_index("t2i_R@1")
    assert table.loc[51.0, "seeds"] == 2 and list(table["seeds"].drop(51.0)) == [1] * 6
    labels = table["settings"].to_dict()
    assert "adapter.rank=4" in labels[60.0] and "regularizer.weight=0.1" in labels[61.0]
    assert "trainer.selection=validation" in labels[62.0] and "trainer.precision=bfloat16" in labels[63.0]
    assert "trainer.batch_size=64" in labels[64.0] and f"data.fingerprint={'e' * 12}" in labels[65.0]
    assert len(set(labels.values())) == 7 and "trainer.rates" not in "".join(labels.values())
    assert table["difference"].isna().all() if "difference" in table else True


def test_a_setting_that_an_earlier_version_did_not_have_is_null(runs: Runs) -> None:
    for seed in range(3):
        path = runs.write("train_retrieval", score=50.0 + seed, seed=seed) / "config.yaml"
        config = yaml.safe_load(path.read_text())
        if seed == 0:
            del config["trainer"]["selection_metric"], config["trainer"]["save_minutes"]
        path.write_text(yaml.safe_dump(config))
    table = table_of(runs)
    assert table["seeds"].tolist() == [3] and table["settings"].isna().all()


def test_settings_of_other_methods_are_no_difference(runs: Runs) -> None:
    """A row without a penalty has no weight, and dropout is compared among adapters of one name."""
    runs.write("train_retrieval", "regularizer=none", score=50.0)
    runs.write("train_retrieval", "regularizer=linear", score=51.0)
    runs.write("train_retrieval", "regularizer=cosine", score=52.0, regularizer__weight=0.5)
    runs.write("train_retrieval", "adapter=full", "regularizer=none", score=53.0)
    assert table_of(runs)["settings"].isna().all()


def test_prior_works_way_is_labelled_though_all_rows_have_it(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    words = "the epoch of each stage with the best Rsum on the test split"
    overrides = ("table1=msrvtt_lora", "data.validation=test", "trainer.selection=validation")
    runs.write("train_retrieval", *overrides, score=40.0, run={"selection": words})
    published = ("table1=flickr30k_lora", "protocol=as_published")
    runs.write("train_retrieval", *published, score=80.0)
    table = table_of(runs).set_index("table")
    assert table.loc["retrieval msrvtt", "settings"] == "data.validation=test"
    assert table.loc["retrieval flickr30k", "settings"] == "protocol.name=as_published"
    printed = capsys.readouterr().out
    assert f"Weights of {words}." in printed and "validated on the test split, as in prior work" in printed


def test_vtab_has_its_19_data_sets_and_averages(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    for dataset, accuracy in row("LoRA").items():
        for seed in range(3):
            if seed < 2 or dataset == "cifar":
                runs.write(
                    "train_classification", "data=vtab", "model=vit_b16", data__dataset=dataset, seed=seed,
                    score=accuracy + seed, run={"data": {"name": "vtab", "fingerprint": dataset}},
                )  # fmt: skip
    unlike = {"data__train": "train800", "trainer__selection": "validation"}
    runs.write("train_classification", "data=vtab", "model=vit_b16", data__dataset="dtd", score=10.0, **unlike)
    table = table_of(runs).set_index("seeds")
    assert sorted(table.index) == ["1", "2 to 3"] and set(table["table"]) == {"classification vtab"}
    both = table.loc["2 to 3"]
    assert both["cifar"] == pytest.approx(74.7) and both["dtd"] == pytest.approx(72.9)
    assert (both["average"], both["all"]) == pytest.approx((76.5 + 0.5, 74.3 + 0.5), abs=0.06)
    assert both["average sd"] == pytest.approx(np.std([0, 1], ddof=1))
    assert "data.train=train800" in table.loc["1", "settings"] and pd.isna(table.loc["1", "average"])
    printed = capsys.readouterr().out
    assert "77.0 ± 0.7" in printed and "Average: mean of the groups' means" in printed
    (cifar,) = (line for line in printed.splitlines() if line.startswith("| cifar "))
    assert sorted(cell.strip() for cell in cifar.split("|")[2:-1]) == ["-", "74.7 ± 1.0"]
    assert max(map(len, printed.splitlines())) < 170


@pytest.mark.parametrize("recipe", ["fact_tk", "dtl_plus", "ssf", "noah"])
def test_what_a_recipe_chooses_by_data_set_is_one_row(recipe: str, runs: Runs) -> None:
    for dataset in ("cifar", "dtd", "eurosat"):
        runs.write("train_classification", f"table2={recipe}", f"data.dataset={dataset}", score=50.0)
    assert table_of(runs)["settings"].isna().tolist() == [True]  # one row, with nothing to tell
    of_one = {"fact_tk": "adapter.rank", "dtl_plus": "adapter.kernel", "ssf": "model.drop_path", "noah": "adapter.rank"}
    other = f"{of_one[recipe]}=1"
    runs.write("train_classification", f"table2={recipe}", "data.dataset=cifar", other, score=50.0)
    assert len(table_of(runs)) == 2 and other in " ".join(table_of(runs)["settings"].dropna())


def test_one_data_set_of_vtab_is_compared_on_itself(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in range(2):
        for name, score in (("none", 70.0), ("linear", 71.0 + seed)):
            runs.write(
                "train_classification", "data=vtab", "model=vit_b16", f"regularizer={name}", score=score, seed=seed
            )
    table = table_of(runs)
    assert "dtd" not in table and table.loc[1, "difference"] == pytest.approx(1.5)
    assert "difference in cifar" in capsys.readouterr().out


def test_the_first_stage_is_a_row_and_what_a_penalty_is_compared_with(runs: Runs) -> None:
    first, second = (70.0, 71.5, 69.0), (72.0, 72.5, 72.0)
    for seed in range(3):
        after = {"after": {"adapt": {"test": {"accuracy": first[seed]}}}}
        for name in ("linear", "cosine"):  # which share it
            runs.write("train_classification", f"regularizer={name}", score=second[seed], seed=seed, metrics=after)
    table = table_of(runs)
    assert list(table["regularizer"]) == ["none", "cosine", "linear"] and list(table["seeds"]) == [3, 3, 3]
    assert table.loc[0, "settings"] == "after=adapt" and table.loc[0, "accuracy"] == pytest.approx(np.mean(first))
    assert list(table["against"][1:]) == [1, 1]
    assert table.loc[2, "difference"] == pytest.approx(np.mean(second) - np.mean(first))

    for seed in range(3):  # as long, without the penalty: what was asked for
        runs.write("train_classification", "regularizer=none", score=second[seed] - 0.1 * seed, seed=seed)
    table = table_of(runs)
    assert list(table["regularizer"]) == ["none", "none", "cosine", "linear"] and list(table["against"][2:]) == [1, 1]
    assert table.loc[3, "difference"] == pytest.approx(0.1) and pd.isna(table.loc[0, "settings"])


def test_a_run_of_the_first_stage_alone_is_compared_with_where_nothing_is_more_alike(runs: Runs) -> None:
    vtab = ("train_classification", "data=vtab", "model=vit_b16", "data.dataset=cifar")
    for seed in range(2):
        for dataset in VTAB_1K:
            more = {"data__dataset": dataset, "seed": seed}
            runs.write(*vtab, score=60.0 + seed, **more)
            runs.write(*vtab, "regularizer=none", score=59.0, trainer__stages__regularize__epochs=0, **more)
            other_rank = {"adapter__rank": 4, "trainer__stages__regularize__epochs": 0}
            runs.write(*vtab, "regularizer=none", score=50.0, **other_rank, **more)
    table = table_of(runs)
    (penalty,) = table.index[table["regularizer"] == "linear"]
    reference = table.loc[int(table.loc[penalty, "against"]) - 1]
    assert reference["average"] == 59.0 and table.loc[penalty, "difference"] == pytest.approx(1.5)


def test_runs_that_cannot_be_used_are_named(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    first = runs.write("train_retrieval", score=50.0)
    unfinished = runs.write("train_retrieval", score=None, seed=1)
    again = runs.write("train_retrieval", score=58.0)
    broken, other, no_run = (runs.write("train_retrieval", score=50.0, seed=seed) for seed in (2, 3, 4))
    (broken / "metrics.json").write_text('{"test": ')
    (other / "config.yaml").write_text("just: text")
    (no_run / "run.json").unlink()
    table = table_of(runs)
    assert len(table) == 1 and table.loc[0, "seeds"] == 1 and table.loc[0, "t2i_R@1"] == 50
    printed = capsys.readouterr().out
    assert "5 run(s) left out:" in printed and f"- {unfinished}: not finished" in printed
    assert f"- {again}: the same settings and seed as {first}" in printed
    assert f"- {other}: cannot be read: it lacks 'data.name'" in printed
    assert f"- {broken}: cannot be read: Expecting value" in printed and f"- {no_run}: cannot be read" in printed
    with pytest.raises(ValueError, match=f"no finished run below {unfinished}, so there is no table"):
        results_table.main([unfinished], runs.folder / "none.csv")
    assert not (runs.folder / "none.csv").exists()
    (runs.folder / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no folder of a run"):
        results_table.main([runs.folder / "empty"], None)
    with pytest.raises(FileNotFoundError, match="nowhere is no folder"):
        results_table.main([runs.folder / "nowhere"], None)

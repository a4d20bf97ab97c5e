"""The MSR-VTT recipe end to end: every row of Table 1 on small real videos, and the published settings."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from msrvtt_folder import TEST, write_sound
from small_clip import registered

from eval import render_table
from retrieval.data import MSRVTT
from retrieval.train import train
from training.experiment import LOW_RANK

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from command_line import CONF, compose

SMALL = (
    "data.size=32", "data.frames=2", "data.check_counts=false", "model.weights=random",
    "trainer.batch_size=8", "trainer.workers=0", "trainer.threads=1", "trainer.precision=float32",
    "trainer.stages.adapt.epochs=1", "trainer.stages.regularize.epochs=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("msrvtt")
    write_sound(root)
    MSRVTT.prepare(root, root / "cache", workers=0, size=32, frames=2, check_counts=False)
    return root


@pytest.mark.parametrize("row", sorted(path.stem for path in (CONF / "table1").glob("msrvtt_*.yaml")))
def test_a_row_of_table_1(row: str, root: Path, tmp_path: Path) -> None:
    """Each of them trains to its metrics, from the frame cache; redundancy where the adapter has subspaces."""
    threads = torch.get_num_threads()
    overrides = [f"table1={row}", *SMALL, f"model.towers={registered()}", f"root={root}", f"runs={tmp_path}"]
    config = compose("train_retrieval", overrides)
    try:
        run = train(config)
    finally:
        torch.set_num_threads(threads)
    metrics = run.read_json("metrics.json")
    assert "validation" not in metrics  # all of the published training videos train
    assert run.read_json("run.json")["data"]["images"] == {"train": 6, "validation": 0, "test": 3}
    assert ("redundancy" in metrics) == (config["adapter"]["name"] in LOW_RANK)
    assert metrics["test"]["rsum"] > 0 and (run.path / "report.html").is_file()
    log = [json.loads(line) for line in (run.path / "log.jsonl").read_text().splitlines()]
    assert not any("validation" in line for line in log)
    penalised = {line["stage"] for line in log if "resora_linear" in line.get("parts", {})}
    assert penalised == ({"regularize"} if row == "msrvtt_lora_resora" else set())


def test_the_published_recipe() -> None:
    """CLIP4Clip's own settings (Luo et al. 2021 and the authors' command for MSR-VTT)."""
    config = compose("train_retrieval", ["table1=msrvtt_full"])
    trainer, data = config["trainer"], config["data"]
    assert [stage["epochs"] for stage in trainer["stages"].values()] == [5, 0]
    assert (trainer["batch_size"], trainer["pairing"], trainer["optimizer"]) == (128, "caption", "bert_adam")
    assert trainer["rates"] == {"adapter": 1e-4, "head": 1e-4, "backbone": 1e-7, "weight_decay": 0.2}
    assert (trainer["schedule"]["name"], trainer["warmup"], trainer["max_grad_norm"]) == ("warmup_cosine", 0.1, 1.0)
    assert (data["validation"], trainer["selection"]) == (0, "last")
    assert (data["train"], data["frames"], data["frames_per_second"], data["slicing"]) == ("9k", 12, 1.0, "uniform")
    assert (config["model"]["max_length"], config["model"]["projections"]) == (32, "backbone")


def test_selection_on_test_and_dead_videos_are_said(root: Path, tmp_path: Path) -> None:
    """As prior work selects, and by what CLIP4Clip's code does; one video of the test cannot be read."""
    folder = tmp_path / "msrvtt"
    shutil.copytree(root / "msrvtt", folder, ignore=shutil.ignore_patterns("frames"))
    (folder / "videos" / f"{TEST[1]}.mp4").write_bytes(b"")
    with pytest.warns(UserWarning, match="cannot be read"):
        MSRVTT.prepare(
            tmp_path, tmp_path / "cache", workers=0, size=32, frames=2, check_counts=False, max_unreadable=0.5
        )
        config = compose(
            "train_retrieval",
            [
                *("table1=msrvtt_lora", *SMALL, "data.validation=test", "data.max_unreadable=0.5"),
                *("trainer.selection=validation", "trainer.selection_metric=t2i_R@1"),
                *("trainer.stages.regularize.epochs=0", f"model.towers={registered()}"),
                *(f"root={tmp_path}", f"runs={tmp_path / 'runs'}"),
            ],
        )
        threads = torch.get_num_threads()
        try:
            run = train(config)
        finally:
            torch.set_num_threads(threads)
    described, report = run.read_json("run.json"), (run.path / "report.html").read_text()
    expected = (
        "the epoch of each stage with the best t2i_R@1 on the test split (data.validation=test, as in prior work)"
    )
    assert described["selection"] == expected and report.count(expected) == 3
    for split in ("validation", "test"):
        assert f"1 of 3 videos of {split} cannot be read" in described["preprocessing"]
    assert described["preprocessing"] in report and described["preprocessing"].count("at most 2 frames") == 1
    assert "validation = test " in render_table(run.read_json("metrics.json"))
    assert "validation = test<" in report and "Recall on test, in percent" in report


def test_without_a_validation_split_nothing_is_selected_on_it(root: Path, tmp_path: Path) -> None:
    overrides = [f"model.towers={registered()}", f"root={root}", f"runs={tmp_path}", "trainer.selection=validation"]
    with pytest.raises(ValueError, match=r"data=msrvtt holds nothing out .*data\.validation=500"):
        train(compose("train_retrieval", ["table1=msrvtt_lora", *SMALL, *overrides]))
    assert not list(tmp_path.iterdir())

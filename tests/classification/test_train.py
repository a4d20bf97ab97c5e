"""The command at tiny size, end to end: the real encoder, real digits."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from sklearn.metrics import accuracy_score

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))  # as for `python scripts/train_classification.py`

import evaluate as evaluate_command
import train_classification
from command_line import compose

from adapters import load
from classification.assemble import assemble
from classification.evaluate import evaluate, predict
from classification.experiment import Experiment
from classification.train import train
from training import RunFolder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    root = tmp_path_factory.mktemp("data")
    (root / "cache").symlink_to(cache.resolve())
    return root


def overrides(root: Path, runs: Path) -> list[str]:
    small = "data.size=28 data.train_images=64 model.frozen_blocks=11 trainer.batch_size=16 seed=3 trainer.threads=1 "
    small += "trainer.precision=float32 trainer.stages.adapt.epochs=2 trainer.stages.regularize.epochs=1"
    return [f"root={root}", f"runs={runs}", *small.split()]


def config(root: Path, runs: Path, *more: str) -> dict[str, Any]:
    return compose("train_classification", [*overrides(root, runs), *more])


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)  # a run sets its own


def test_lora_with_the_penalty(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    train_classification.main(config(root, tmp_path))
    printed = capsys.readouterr().out
    folder = tmp_path / "classification/digits/dinov2_small/lora/linear/seed3"
    metrics, described = (json.loads((folder / f"{name}.json").read_text()) for name in ("metrics", "run"))
    asked = yaml.safe_load((folder / "config.yaml").read_text())

    # What was asked for: a subset by the run's seed, LoRA on q, k and v of the one block that trains.
    assert asked["data"]["subset_seed"] == 3 and asked["adapter"]["targets"] == ["q", "k", "v"]
    assert described["data"]["images"] == {"train": 64, "validation": 300, "test": 500}
    assert described["adapter_parameters"] == 3 * 8 * (384 + 384)
    assert described["trained_parameters"] == 3 * 8 * (384 + 384) + 384 * 10 + 10
    assert described["total_parameters"] > 21_000_000

    # What it printed is what it measured, and the file alone gives it again.
    assert re.search(rf"test .* {metrics['test']['accuracy']:.1f}", printed) and str(folder) in printed
    assert set(metrics) == {"validation", "test", "chance", "redundancy", "after"}
    assert metrics["test"]["accuracy"] > 20 and metrics["chance"]["test"]["accuracy"] == 10
    data, splits, model = assemble(Experiment.of(asked))
    load(model, folder / "adapter.safetensors")
    assert evaluate(model, splits["test"]) == pytest.approx(metrics["test"], rel=1e-4)
    correct = accuracy_score(data.labels[data.splits["test"]], predict(model, splits["test"]).argmax(1))
    assert metrics["test"]["accuracy"] == pytest.approx(100 * correct)

    # So does the command, from the folder.
    again = tmp_path / "again.json"
    evaluate_command.main(compose("evaluate", [f"run={folder}", f"output={again}"]))
    assert f"{metrics['test']['accuracy']:.1f}" in capsys.readouterr().out
    assert json.loads(again.read_text())["test"] == pytest.approx(metrics["test"], rel=1e-6)

    # Both stages ran, the second with the penalty; each epoch was validated.
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    parts = {line["stage"]: set(line["parts"]) for line in log if "parts" in line}
    assert parts == {"adapt": {"cross_entropy"}, "regularize": {"cross_entropy", "resora_linear"}}
    assert sum("validation" in line for line in log) == 3
    heat = json.loads((folder / "redundancy.json").read_text())
    assert set(heat["before"]) == {f"blocks.11.attn.qkv.{role}" for role in "qkv"}
    off = [np.array(matrix)[~np.eye(8, dtype=bool)].mean() for matrix in heat["after"].values()]
    assert metrics["redundancy"]["after"] == pytest.approx(np.mean(off), rel=1e-5)

    # A finished run is not repeated.
    written = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert train(config(root, tmp_path)).path == folder
    assert written == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_linear_probe_selected_on_validation(root: Path, tmp_path: Path) -> None:
    folder = train(config(root, tmp_path, "adapter=linear", "regularizer=none", "trainer.selection=validation")).path
    assert folder == tmp_path / "classification/digits/dinov2_small/linear/none/seed3"
    metrics, described = (json.loads((folder / f"{name}.json").read_text()) for name in ("metrics", "run"))
    assert described["trained_parameters"] == 384 * 10 + 10 and described["adapter_parameters"] == 0
    assert described["selection"] == "the epoch of each stage with the best accuracy on validation"
    assert "redundancy" not in metrics and not (folder / "redundancy.json").exists()
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    scores = [line["validation"]["accuracy"] for line in log if "validation" in line]
    assert metrics["validation"]["accuracy"] == pytest.approx(scores[-1]), "one epoch: the best one of the last stage"


def test_an_adapter_without_subspaces(root: Path, tmp_path: Path) -> None:
    run = train(config(root, tmp_path, "adapter=bitfit", "regularizer=none", "trainer.stages.adapt.epochs=1"))
    described, metrics = run.read_json("run.json"), run.read_json("metrics.json")
    assert described["adapter_parameters"] > 0 and metrics["test"]["accuracy"] > 0
    assert "redundancy" not in metrics and not (run.path / "redundancy.json").exists()


@pytest.mark.parametrize(
    ("argument", "hint"),
    [
        ("data.train_images=5", "train_images is 5; expected 10 to"),
        ("data.size=30", "not a positive multiple of the patch"),
        ("model.frozen_blocks=12", "expected 0 .* to 11"),
        ("data.train_images=10", "10 training items make no batch of 16; lower trainer.batch_size"),
        ("trainer.precision=bf16", "precision is 'bf16'; expected one of float32, bfloat16"),
        ("trainer.threads=0", "threads is 0; expected at least 1"),
        ("adapter=linear", "use regularizer=none"),
        ("data.name=openmoji", "unknown data 'openmoji'; choose from digits"),
        ("model.name=vse_infty", "unknown model 'vse_infty'; choose from dinov2_small"),
    ],
)
def test_a_mistake_leaves_nothing(argument: str, hint: str, root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=hint):
        train(config(root, tmp_path, argument))
    assert not list(tmp_path.iterdir())


def test_a_run_that_cannot_be_gone_on_from_leaves_nothing(root: Path, tmp_path: Path) -> None:
    runs, other = tmp_path / "runs", RunFolder(tmp_path / "other")
    with pytest.raises(FileNotFoundError, match="expected a run folder that has finished its stage 'adapt'"):
        train(config(root, runs, f"start_from={other.path}"))
    other.begin(config(root, runs, "seed=4"))
    other.write_json("checkpoints/adapt/history.json", [])
    with pytest.raises(ValueError, match=r"was trained in another way .*seed: 4 there, 3 here"):
        train(config(root, runs, f"start_from={other.path}"))
    assert not runs.exists()

"""Whole models on list files, end to end at tiny size: real JPEG files, real timm models with random weights."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import Tensor
from vtab_folder import write_few_shot, write_vtab

from classification.assemble import assemble, restore
from classification.data import Digits
from classification.evaluate import evaluate
from classification.experiment import Experiment
from classification.images import LabelledImages
from classification.train import train
from eval import render_accuracy
from training import RunFolder
from training.run import Unrestorable

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))  # as for `python scripts/evaluate.py`

import command_line
import evaluate as evaluate_command

ROOT = Path(__file__).parent.parent.parent
SMALL = """
    model=vit_b16 model.architecture=test_vit model.weights=random data.size=32 data.check_counts=false seed=1
    trainer.batch_size=8 trainer.threads=1 trainer.precision=float32 trainer.workers=0
    trainer.stages.adapt.epochs=4 trainer.stages.regularize.epochs=1 trainer.rates.adapter=1e-2 trainer.rates.head=1e-2
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_vtab(root), write_few_shot(root)
    return root


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)  # a run sets its own


def config(root: Path, runs: Path, *more: str) -> dict[str, Any]:
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "scripts/conf")):
        composed = compose(
            "train_classification", [f"root={root}", f"runs={runs}", *more[:1], *SMALL.split(), *more[1:]]
        )
    plain = OmegaConf.to_container(composed, resolve=True)
    assert isinstance(plain, dict)
    return plain


def test_vtab_trains_on_all_images_and_looks_at_the_test_after_each_stage(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = config(root, tmp_path, "data=vtab")
    run = train(asked)
    assert run.path == tmp_path / "classification/vtab-cifar/vit_b16/lora/linear/seed1"
    metrics, described = run.read_json("metrics.json"), run.read_json("run.json")
    assert set(metrics) == {"test", "chance", "redundancy", "after"} and metrics["chance"]["test"]["accuracy"] == 25
    assert metrics["test"]["accuracy"] > 60, "each class has its colour"
    assert described["data"]["images"] == {"train": 24, "validation": 0, "test": 12}
    assert described["preprocessing"].startswith("jpg files, ") and "32" in described["preprocessing"]
    log = [json.loads(line) for line in (run.path / "log.jsonl").read_text().splitlines()]
    assert not [line for line in log if "validation" in line]
    assert {part for line in log for part in line["parts"]} == {"cross_entropy", "resora_linear"}

    # The adapter file alone gives the numbers again, on the backbone that the seed makes, wherever the data are.
    moved = tmp_path / "moved"
    shutil.copytree(root, moved)
    data, splits, model = restore(run.path, moved)
    assert data.folder.images.is_relative_to(moved)
    assert evaluate(model, splits["test"]) == pytest.approx(metrics["test"], rel=1e-4)
    assert not list(run.path.glob("checkpoints/*/checkpoint-*")), "no optimiser states"
    picture = data.folder.images / data.files[-1]
    picture.write_bytes(picture.read_bytes() + b"\0")
    with pytest.raises(Unrestorable, match="was trained on other data"):
        restore(run.path, moved)
    with pytest.raises(Unrestorable, match="was trained on other data"):
        train(config(moved, tmp_path, "data=vtab"))

    # What the run says of its first stage is what a run of that stage alone measures, and one can go on from that.
    reference = ("regularizer=none", "trainer.stages.regularize.epochs=0")
    alone = train(config(root, tmp_path / "alone", "data=vtab", *reference))
    assert alone.read_json("metrics.json")["test"] == metrics["after"]["adapt"]["test"] != metrics["test"]
    assert "after" not in alone.read_json("metrics.json")
    gone_on = train(config(root, tmp_path / "on", "data=vtab", f"start_from={alone.path}"))
    assert gone_on.read_json("metrics.json") == metrics

    # Of several processes the second one, when all is trained, writes nothing.
    (gone_on.path / "metrics.json").unlink()
    own = [gone_on.path / name for name in ("log.jsonl", "redundancy.json", "adapter.safetensors")]
    written = [path.stat().st_mtime_ns for path in own]
    monkeypatch.setenv("RANK", "1")
    assert not train(config(root, tmp_path / "on", "data=vtab", f"start_from={alone.path}")).finished
    assert [path.stat().st_mtime_ns for path in own] == written


def test_a_configuration_of_another_version(root: Path, tmp_path: Path) -> None:
    run, asked = RunFolder(tmp_path), config(root, tmp_path, "data=vtab")
    del asked["trainer"]["chunk_size"]
    run.begin(asked)
    (tmp_path / "adapter.safetensors").touch()
    with pytest.raises(Unrestorable, match="lacks 'chunk_size': another version of the suite wrote it"):
        restore(tmp_path)


def test_held_out_images_choose_the_epoch(root: Path, tmp_path: Path) -> None:
    held_out = ("data.train=train800", "trainer.selection=validation", "adapter=ssf", "regularizer=none")
    assert config(root, tmp_path, "data=vtab")["trainer"]["evaluate_every"] == 10  # and the last epoch of each stage
    run = train(config(root, tmp_path, "data=vtab", *held_out))
    metrics = run.read_json("metrics.json")
    log = [json.loads(line) for line in (run.path / "log.jsonl").read_text().splitlines()]
    scores = [line["validation"]["accuracy"] for line in log if "validation" in line]
    assert len(scores) == 2 and metrics["validation"]["accuracy"] == pytest.approx(scores[-1])
    with pytest.raises(ValueError, match=r"selection=validation, but data=vtab .* \(data\.train=train800\)"):
        train(config(root, tmp_path / "other", "data=vtab", "trainer.selection=validation"))
    assert not (tmp_path / "other").exists()


def test_selection_on_the_test_split_is_labelled(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    as_prior_work = ("data.validation=test", "trainer.selection=validation", "adapter=linear", "regularizer=none")
    run = train(config(root, tmp_path, "data=vtab", *as_prior_work))
    metrics, selection = run.read_json("metrics.json"), run.read_json("run.json")["selection"]
    assert metrics["validation"] == metrics["test"] and metrics["validation_is"] == "test"
    assert selection.endswith("on the test split (data.validation=test, as in prior work)")
    header, *lines = render_accuracy(metrics).splitlines()
    assert lines[0].startswith("validation = test") and {len(line) for line in lines} == {len(header)}
    capsys.readouterr()
    written = tmp_path / "again.json"
    evaluate_command.main(
        command_line.compose("evaluate", [f"run={run.path}", "split=validation", f"output={written}"])
    )
    again = capsys.readouterr().out
    assert lines[0] in again and again.endswith(f"Model selected by: {selection}\n")
    assert json.loads(written.read_text())["validation_is"] == "test"


def test_a_few_shots(root: Path, tmp_path: Path) -> None:
    few = ("data.dataset=oxford-pets", "data.shots=4", "data.augmentation=randaugment", "trainer.selection=last")
    run = train(config(root, tmp_path, "data=few_shot", *few))
    assert run.path == tmp_path / "classification/few_shot-oxford-pets-4/vit_b16/lora/linear/seed1"
    described = run.read_json("run.json")
    assert described["data"]["images"] == {"train": 12, "validation": 6, "test": 6}
    assert "in training random resized crop" in described["preprocessing"]
    assert set(run.read_json("metrics.json")) == {"validation", "test", "chance", "redundancy", "after"}


def test_another_seed_is_another_training(root: Path, tmp_path: Path) -> None:
    """It gives the adapter other first values, and the images other augmentations."""
    few = ("data=few_shot", "data.dataset=oxford-pets", "data.shots=4", "data.augmentation=randaugment")
    asked = config(root, tmp_path, *few)
    found = [assemble(Experiment.of(asked | {"seed": seed})) for seed in (0, 1, 1)]
    assert [splits["train"].seed for _, splits, _ in found] == [0, 1, 1]
    one, other, again = (splits["train"][0]["images"] for _, splits, _ in found)
    assert not torch.equal(one, other) and torch.equal(other, again)
    names = [name for name, _ in found[0][2].named_parameters() if name.endswith(".A")]
    assert names
    for name in names:
        one, other, again = (model.get_parameter(name) for _, _, model in found)
        assert not torch.equal(one, other) and torch.equal(other, again)


class Coloured:
    """Image i is all i; augmented, it is i and its seed."""

    labels = np.array([5, 6, 7])
    augmentation = "seeded"

    def images(self, indices: list[int]) -> Tensor:
        return torch.stack([torch.full((3, 2, 2), float(index)) for index in indices])

    def augmented(self, index: int, seed: int) -> Tensor:
        return torch.full((3, 2, 2), float(index + seed % 1000 / 1000))


def test_augmentation_follows_seed_and_epoch_and_stays_out_of_evaluation() -> None:
    data: Any = Coloured()
    first, again, other = (LabelledImages(data, np.array([2, 0]), augmented=True, seed=seed) for seed in (0, 0, 1))
    assert [first[0]["labels"].item(), first[1]["labels"].item()] == [7, 5]
    in_epoch_0 = first[0]["images"]
    assert torch.equal(in_epoch_0, again[0]["images"]) and not torch.equal(in_epoch_0, other[0]["images"])
    first.set_epoch(1)
    assert not torch.equal(in_epoch_0, first[0]["images"])
    (batch,) = first.batches(8)
    assert batch["images"][:, 0, 0, 0].tolist() == [2, 0]
    assert [len(batch["images"]) for batch in first.batches(1, first=1)] == [1]


def test_a_cut_model_refuses_augmentation(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes tokens, which are computed once."""
    (tmp_path / "cache").symlink_to(cache.resolve())
    monkeypatch.setattr(Digits, "augmentation", "flip")
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "scripts/conf")):
        composed = compose("train_classification", [f"root={tmp_path}", "data.size=28", "model.frozen_blocks=11"])
    with pytest.raises(ValueError, match=r"tokens of an image once, and data\.augmentation='flip' .* \(vit_b16\)"):
        assemble(Experiment.of(OmegaConf.to_container(composed, resolve=True)))

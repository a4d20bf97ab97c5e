"""A training of CLIP4Clip from the command's own configuration to its report, with each kind of head."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from small_clip import registered

from retrieval.assemble import restore
from retrieval.data.openmoji_clips import OpenMojiClips
from retrieval.evaluate import encode
from retrieval.experiment import Experiment
from retrieval.train import Retrieval, train

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    OpenMojiClips.prepare(root, root / "cache", clips=(12, 4, 4), size=64)
    return root


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)  # a run sets its own


def config(root: Path, runs: Path, *more: str) -> dict[str, Any]:
    small = "data=openmoji_clips data.size=32 data.frames=3 model=clip4clip_vit_b32 model.weights=random "
    small += "trainer.batch_size=6 trainer.threads=1 trainer.precision=float32 trainer.stages.adapt.epochs=1"
    overrides = [f"root={root}", f"runs={runs}", f"model.towers={registered()}", *small.split(), *more]
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "scripts/conf")):
        plain = OmegaConf.to_container(compose("train_retrieval", overrides), resolve=True)
    assert isinstance(plain, dict)
    return plain


@pytest.mark.parametrize(
    "more",
    [
        ("model.head=seqLSTM", "trainer.chunk_size=4"),
        ("model.head=tightTransf",),
        ("model.head=seqTransf", "trainer=msrvtt", "trainer.restart=false", "trainer.workers=0", "loss=triplet"),
    ],
    ids=lambda more: more[0],
)
def test_a_run(root: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    run = train(config(root, tmp_path, "trainer.stages.regularize.epochs=1", *more))
    metrics = json.loads((run.path / "metrics.json").read_text())
    assert 0 <= metrics["test"]["rsum"] <= 600 and (run.path / "report.html").is_file()
    log = [json.loads(line) for line in (run.path / "log.jsonl").read_text().splitlines()]
    parts = [line["parts"] for line in log if "parts" in line]
    assert all(np.isfinite(list(part.values())).all() for part in parts)
    assert {name for part in parts for name in part} == {
        "triplet" if "loss=triplet" in more else "info_nce",
        "resora_linear",
    }
    if "trainer=msrvtt" in more:  # one schedule over both stages: 36 pairs, 6 steps an epoch, 12 in all
        last = [line["learning_rate"] for line in log if "learning_rate" in line][-1]
        assert last == pytest.approx(1e-4 * (1 + np.cos(np.pi * 11 / 12)) / 2)
    splits, model, captions = restore(run.path)
    again = encode(model, splits["test"], captions["test"]).metrics(splits["test"].image_of_caption)
    assert again == pytest.approx(metrics["test"])


def test_what_is_ranked_is_computed_in_float32(root: Path, tmp_path: Path) -> None:
    """Whatever the training's precision: the cosines of the report against those of CLIP's towers without autocast."""
    run = train(config(root, tmp_path, "trainer.precision=bfloat16", "trainer.stages.regularize.epochs=1"))
    assert run.read_json("run.json")["precision"] == "bfloat16"
    splits, model, captions = restore(run.path)
    data, retrieved = splits["test"], run.read_json("retrieved.json")
    with torch.no_grad():
        clips = [model.collate_visual([data.visual(item)]) for item in range(len(data))]
        visual = torch.cat([model.encode_visual(**clip) for clip in clips])
        text = torch.cat([model.encode_text(torch.tensor([ids])) for ids in captions["test"].ids])
    cosines = text.double() @ visual.double().T
    assert [query["query"] for query in retrieved["queries"]] == list(data.captions), "twelve captions, twelve queries"
    for row, owner, query in zip(cosines, data.image_of_caption, retrieved["queries"], strict=True):
        assert len(query["results"]) == len(data) == 4  # so one is right, wherever it stands, and three are wrong
        for result in query["results"]:
            assert result["score"] == pytest.approx(float(row[result["item"]]), abs=1e-5)
            assert result["right"] is (result["item"] == int(owner))


def test_another_seed_is_another_training(root: Path, tmp_path: Path) -> None:
    """It gives the adapter other first values, and the clips other ones of their captions."""
    asked = config(root, tmp_path)
    found = [Retrieval(Experiment.of(asked | {"seed": seed})) for seed in (0, 1, 1)]
    assert [task.items.seed for task in found] == [0, 1, 1]
    one, other, again = ([task.items[index]["input_ids"] for index in range(12)] for task in found)
    assert one != other == again
    names = [name for name, p in found[0].model.named_parameters() if p.requires_grad and name.endswith(".A")]
    assert names
    for name in names:
        one, other, again = (task.model.get_parameter(name) for task in found)
        assert not torch.equal(one, other) and torch.equal(other, again)


def test_clips_without_frames_train_and_are_counted(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every third clip cannot be read: the losses leave it out, the evaluation keeps it as one that matches nothing."""
    read = OpenMojiClips.visual

    def visual(self: OpenMojiClips, index: int) -> np.ndarray:
        return read(self, index)[: 0 if index % 3 == 0 else None]

    monkeypatch.setattr(OpenMojiClips, "visual", visual)
    run = train(config(root, tmp_path, "trainer.stages.regularize.epochs=1", "regularizer=none"))
    metrics = json.loads((run.path / "metrics.json").read_text())
    assert np.isfinite(list(metrics["test"].values())).all()
    assert metrics["test"]["i2t_MeanR"] >= 1 + 2 / 4 * (3 * 3) / 2  # two of four clips tie with all nine wrong captions
    assert "2 of 4 test items hold nothing that could be encoded" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("model.head=tightTransf", "trainer.chunk_size=4"), "chunk_size needs a loss of separate embeddings"),
        (("trainer.augmentation={drop_regions:0.2,change_words:0.2}",), "no mask token"),
        (("trainer.optimizer=bertadam",), "unknown optimizer 'bertadam'; did you mean 'bert_adam'"),
        (("trainer.schedule.name=steps",), "unknown schedule 'steps'; did you mean 'step'"),
        (("trainer.schedule.name=step",), "does not take these settings"),
        (("trainer.chunk_size=0",), "chunk_size is 0"),
        (("trainer.batch_size=16",), "12 training items make no batch of 16"),
        (("trainer.precision=bf16",), "precision is 'bf16'"),
    ],
)
def test_what_cannot_be_trained_is_said_before(root: Path, tmp_path: Path, more: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(config(root, tmp_path, *more))
    assert not list(tmp_path.iterdir())


def test_a_run_that_cannot_be_gone_on_from_leaves_nothing(root: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected a run folder that has finished its stage 'adapt'"):
        train(config(root, tmp_path / "runs", f"start_from={tmp_path / 'nowhere'}"))
    assert not list(tmp_path.iterdir())

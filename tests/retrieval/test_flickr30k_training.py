"""The Flickr30K recipe end to end on files in the published format, with a BERT folder as a hub's download has it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from region_folders import WORDS, features_of, write_folder, write_split
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertTokenizer

from adapters import Full, LoRA, inject
from retrieval.batch import Augmentation, Captions, TrainingPairs
from retrieval.data import Flickr30K
from retrieval.experiment import Experiment
from retrieval.models import bert
from retrieval.train import probe, train
from retrieval.vse_infty import VSEInfinity, VSEInfinityConfig
from training.experiment import LOW_RANK
from training.optimizers import LearningRates, parameter_groups

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
from command_line import CONF, compose  # noqa: E402
from mistakes import mistakes_in_one_line  # noqa: E402

SMALL = (
    "data.counts=any", "model.embed_dim=16", "model.hidden_dim=8", "trainer.batch_size=16", "trainer.workers=0",
    "trainer.threads=1", "trainer.precision=float32", "trainer.stages.adapt.epochs=1",
    "trainer.stages.regularize.epochs=1",
)  # fmt: skip
COMMON = ("data=flickr30k", "model=vse_infty_base", "loss=triplet", "adapter.rank=2", *SMALL)


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As bert-base-uncased is published: with the head of its pretraining, which nobody here wants."""
    folder = tmp_path_factory.mktemp("root") / "bert-base-uncased"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, "##s"]
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
    )
    BertForMaskedLM(config).save_pretrained(folder)
    BertTokenizer(vocab={word: number for number, word in enumerate(words)}).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("layout", ["once", "repeated", "ragged"])
def test_train(layout: str, bert_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "flickr30k"
    write_folder(folder, repeated=layout == "repeated", regions=6)
    if layout == "ragged":
        sets = [features_of(1, regions=1 + image % 5, seed=image)[0] for image in range(24)]
        write_split(folder, "train", sets)
    (tmp_path / "bert-base-uncased").symlink_to(bert_folder)
    protocol = "as_published" if layout == "ragged" else "mended"
    overrides = [f"root={tmp_path}", f"runs={tmp_path / 'runs'}", f"protocol={protocol}", "seed=3"]
    if protocol == "as_published":
        overrides.append("data.dev_images=7")
    run = train(compose("train_retrieval", [*COMMON, *overrides]))
    assert (run.path / "report.html").is_file() and (run.path / "adapter.safetensors").is_file()
    described, metrics = run.read_json("run.json"), run.read_json("metrics.json")
    assert described["data"]["images"] == {"train": 24, "validation": 7 if layout == "ragged" else 8, "test": 6}
    assert described["data"]["captions"]["train"] == 120
    assert "best Rsum on validation" in described["selection"]
    assert described["preprocessing"].startswith("precomputed region features, ")
    assert 0 < metrics["test"]["rsum"] <= 600
    log = [json.loads(line) for line in (run.path / "log.jsonl").read_text().splitlines()]
    assert {line["stage"] for line in log} == {"adapt", "regularize"}
    assert any("triplet" in line.get("parts", {}) for line in log)


@pytest.mark.parametrize("row", sorted(path.stem for path in (CONF / "table1").glob("flickr30k_*.yaml")))
def test_a_row_of_table_1(row: str, bert_folder: Path, tmp_path: Path) -> None:
    """Each of them trains to its metrics; redundancy is among these where the adapter has subspaces."""
    write_folder(tmp_path / "flickr30k", regions=3)
    (tmp_path / "bert-base-uncased").symlink_to(bert_folder)
    small = [setting for setting in SMALL if not setting.startswith("model.embed_dim")]  # rows give their output's size
    config = compose("train_retrieval", [f"table1={row}", *small, f"root={tmp_path}", f"runs={tmp_path / 'runs'}"])
    run = train(config)
    metrics = run.read_json("metrics.json")
    low_rank = config["adapter"]["name"] in LOW_RANK
    assert ("redundancy" in metrics) == (run.path / "redundancy.json").is_file() == low_rank
    assert (run.path / "report.html").is_file() and metrics["test"]["rsum"] > 0


def test_a_damaged_picture_is_a_grey_square_of_the_report(
    bert_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path / "flickr30k", (24, 8, 5), regions=3)  # each of the five is shown
    (tmp_path / "bert-base-uncased").symlink_to(bert_folder)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(2000, 2005):
        Image.effect_noise((40, 40), 64).save(pictures / f"{number}.jpg")
    (pictures / "2001.jpg").write_bytes(b"<html>not found</html>")
    (pictures / "2002.jpg").write_bytes((pictures / "2003.jpg").read_bytes()[:-200])
    config = compose(
        "train_retrieval", [*COMMON, f"root={tmp_path}", f"runs={tmp_path / 'runs'}", f"data.pictures={pictures}"]
    )
    run = train(config)
    assert "2 of 5 pictures for the report cannot be read" in capsys.readouterr().out
    assert len(list((run.path / "thumbnails").iterdir())) == 5 and (run.path / "report.html").is_file()
    assert (run.path / "thumbnails" / "1.png").read_bytes() != (run.path / "thumbnails" / "2.png").read_bytes()

    # Whatever else befalls the report, the numbers are on the disk by then.
    other = config | {"runs": str(tmp_path / "others")}
    monkeypatch.setattr("retrieval.train.save_showcase", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(other)
    again = train(other)
    assert again.finished and (again.path / "report.html").is_file()

    # What has been lost of it comes back.
    assert not (again.path / "retrieved.json").exists()
    monkeypatch.undo()
    train(other)
    assert again.read_json("retrieved.json") == run.read_json("retrieved.json")
    assert "Not shown" not in (again.path / "report.html").read_text()


def test_one_option_has_the_published_code_back() -> None:
    def settings(protocol: str) -> dict[str, Any]:
        config = compose("train_retrieval", ["data=flickr30k", "model=vse_infty_base", f"protocol={protocol}"])
        return {
            "dev": config["data"]["dev_images"],
            "padding": config["model"]["padding_in_statistics"],
            "words": config["trainer"]["augmentation"]["keep_words"],
            "decay": config["trainer"]["rates"]["decay_vectors"],
            "images": config["model"]["image_for_each_caption"],
        }

    assert settings("mended") == {"dev": None, "padding": False, "words": True, "decay": False, "images": False}
    assert settings("as_published") == {"dev": 1000, "padding": True, "words": False, "decay": True, "images": True}
    default = compose("train_retrieval", ["data=flickr30k", "model=vse_infty_base"])
    assert default == compose("train_retrieval", ["data=flickr30k", "model=vse_infty_base", "protocol=mended"])


@pytest.mark.parametrize(
    "more", [("data=msrvtt", "model=clip4clip_vit_b32"), ("data=openmoji_clips", "model=clip4clip")]
)
def test_the_protocol_is_refused_where_it_would_do_nothing(more: tuple[str, ...]) -> None:
    Experiment.of(compose("train_retrieval", [*more]))
    with pytest.raises(
        ValueError, match=r"protocol=as_published .*model=clip4clip has none of them; use protocol=mended"
    ):
        Experiment.of(compose("train_retrieval", [*more, "protocol=as_published"]))


@pytest.mark.parametrize("data", ["flickr30k", "coco"])
def test_the_published_recipe(data: str) -> None:
    """VSE-infinity's script for region features."""
    config = compose("train_retrieval", [f"data={data}", "model=vse_infty_base", "loss=triplet"])
    trainer = config["trainer"]
    assert trainer["stages"]["adapt"] == {"epochs": 25, "regularize": False}
    assert (trainer["batch_size"], trainer["pairing"], trainer["max_grad_norm"]) == (128, "caption", 2.0)
    assert {key: trainer["rates"][key] for key in ("head", "backbone", "weight_decay")} == {
        "head": 5e-4, "backbone": 5e-5, "weight_decay": 1e-4,
    }  # fmt: skip
    assert trainer["schedule"] == {"name": "step", "at": [15], "factor": 0.1} and trainer["warmup"] == 0
    assert trainer["selection"] == "validation"
    assert config["loss"] == {"name": "triplet", "margin": 0.2, "warmup_epochs": 1}
    assert (config["model"]["name"], config["model"]["embed_dim"], config["model"]["hidden_dim"]) == (
        "vse_infty",
        1024,
        512,
    )


# ---- the parts of the protocol that are not the region encoder's


class Data:
    captions = ("dog", "red ball")
    image_of_caption = np.array([0, 1])

    def __len__(self) -> int:
        return 2

    def visual(self, index: int) -> np.ndarray:
        return np.ones((2, 3), dtype=np.float32)


def test_a_caption_may_lose_all_its_words_as_published_but_an_image_not_all_its_regions(bert_folder: Path) -> None:
    captions = Captions(Data.captions, bert(str(bert_folder), bert_folder)[1])
    shortest = {}
    for keep_words in (True, False):
        augmentation = Augmentation(drop_regions=0.9, change_words=0.9, keep_words=keep_words)
        pairs = TrainingPairs(Data(), captions, pairing="caption", augmentation=augmentation, seed=0)
        items = []
        for epoch in range(100):
            pairs.set_epoch(epoch)
            items += [pairs[0], pairs[1]]
        shortest[keep_words] = min(len(item["input_ids"]) for item in items)
        assert {len(item["visual"]) for item in items} == {1, 2}
    assert shortest == {True: 3, False: 2}  # [CLS] and [SEP] are left


def test_weight_decay_on_everything_as_published() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    for everything, decays in ((False, {0.0: 3, 0.5: 1}), (True, {0.5: 4})):
        groups = parameter_groups(model, LearningRates(weight_decay=0.5, decay_vectors=everything), heads=("0", "1"))
        assert {group["weight_decay"]: len(group["params"]) for group in groups} == decays


def test_the_parts_of_vse_infinity_have_their_rates(bert_folder: Path) -> None:
    encoder, _ = bert(str(bert_folder), bert_folder)
    model = VSEInfinity(encoder, 3, VSEInfinityConfig(embed_dim=16, hidden_dim=8))
    inject(model, Full(), train=model.heads)
    names = {parameter: name for name, parameter in model.named_parameters()}
    parts: dict[float, set[str]] = {}
    for group in parameter_groups(model, LearningRates(adapter=3.0, head=2.0, backbone=1.0), model.heads):
        found = {".".join(names[parameter].split(".")[:2]) for parameter in group["params"]}
        parts[group["lr"]] = parts.get(group["lr"], set()) | found
    assert parts[1.0] == {"text.bert"} and parts.keys() == {1.0, 2.0}
    assert "text.linear" in parts[2.0] and any(part.startswith("image.") for part in parts[2.0])


def test_a_probe_goes_to_the_device_of_the_model(bert_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a training on a GPU; "meta" stands for it."""
    encoder, tokenizer = bert(str(bert_folder), bert_folder)
    model = inject(VSEInfinity(encoder, 3, VSEInfinityConfig(embed_dim=16, hidden_dim=8)), LoRA(rank=2)).to("meta")
    monkeypatch.setattr("retrieval.train.subspaces_on", lambda model, batches: list(batches))
    (batch,) = probe(model, Data(), Captions(Data.captions, tokenizer))
    assert batch.keys() >= {"regions", "input_ids"} and {tensor.device.type for tensor in batch.values()} == {"meta"}


# ---- the commands


def test_preparing_says_how_to_get_the_files(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="2"), mistakes_in_one_line():
        Flickr30K.prepare(tmp_path, tmp_path)
    message = capsys.readouterr().err
    assert message.startswith("error: flickr30k is not in ") and "f30k_precomp" in message
    assert "scripts/convert_regions.py tsv" in message and "scripts/extract_regions.py" in message
    write_folder(tmp_path / "flickr30k", regions=2)
    options = compose("prepare_data", ["data=flickr30k", "data.counts=any"])["data"]["prepare"]
    Flickr30K.prepare(tmp_path, tmp_path, **options)
    with pytest.raises(ValueError, match="published are 29000"):
        Flickr30K.prepare(tmp_path, tmp_path)


def test_a_missing_bert_folder_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path / "flickr30k", regions=2)
    config = compose("train_retrieval", [*COMMON, f"root={tmp_path}", f"runs={tmp_path / 'runs'}"])
    with pytest.raises(FileNotFoundError, match=r"model\.text=.*bert-base-uncased: expected 'minilm' or a folder"):
        train(config)
    assert not (tmp_path / "runs").exists()


def test_chunks_of_a_batch_norm_are_refused_before_the_run_begins(bert_folder: Path, tmp_path: Path) -> None:
    write_folder(tmp_path / "flickr30k", regions=2)
    (tmp_path / "bert-base-uncased").symlink_to(bert_folder)
    more = (f"root={tmp_path}", f"runs={tmp_path / 'runs'}", "trainer.chunk_size=4")
    with pytest.raises(ValueError, match="chunk_size does not go with the batch norm"):
        train(compose("train_retrieval", [*COMMON, *more]))
    assert not (tmp_path / "runs").exists()


def test_several_gpus_in_one_process_are_refused_before_data_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="2 GPUs in one process"):
        train(compose("train_retrieval", [*COMMON, f"root={tmp_path}", f"runs={tmp_path / 'runs'}"]))
    assert not (tmp_path / "runs").exists()

"""Tables 2 and 3 of the paper: a configuration for each row, with the published numbers in its header."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))  # as for `python scripts/train_classification.py`

from command_line import CONF, compose

from adapters import ADAPTERS, inject, trainable_parameters
from classification.data.vtab import VTAB_1K
from classification.experiment import Experiment
from training.choose import choose

# Parameters (M) and the last columns: "Average" and "All Set Average" of Table 2; the three groups and their mean of
# Table 3. Of Table 2's rows with ReSoRA the paper prints the gains.
PUBLISHED: dict[str, tuple[float, ...]] = {
    "table2=full": (85.8, 68.9, 65.6),
    "table2=linear": (0, 57.6, 53.0),
    "table2=bitfit": (0.10, 65.2, 62.0),
    "table2=vpt": (0.56, 72.0, 69.4),
    "table2=lst": (2.38, 74.3, 71.7),
    "table2=adalora": (0.44, 74.6, 72.2),
    "table2=adaptformer": (0.16, 74.7, 72.3),
    "table2=noah": (0.43, 75.5, 73.2),
    "table2=ssf": (0.21, 75.7, 73.2),
    "table2=fact_tk": (0.07, 75.2, 72.9),
    "table2=fact_tk_resora": (0.07, 75.2 + 0.6, 72.9 + 0.6),
    "table2=lora": (0.44, 76.5, 74.3),
    "table2=lora_resora": (0.44, 76.5 + 0.7, 74.3 + 0.7),
    "table2=moslora": (0.40, 76.8, 74.6),
    "table2=moslora_resora": (0.40, 76.8 + 0.3, 74.6 + 0.2),
    "table2=dtl_plus": (0.04, 77.5, 75.5),
    "table2=dtl_plus_resora": (0.04, 77.5 + 0.4, 75.5 + 0.3),
    "table3=swin_full": (86.7, 79.2, 86.2, 59.7, 75.0),
    "table3=swin_linear": (0, 73.5, 80.8, 33.5, 62.6),
    "table3=swin_bitfit": (0.20, 74.2, 80.1, 42.4, 65.6),
    "table3=swin_vpt": (0.16, 76.8, 84.5, 53.4, 71.6),
    "table3=swin_fact_tk": (0.14, 83.4, 86.8, 61.3, 77.2),
    "table3=swin_fact_tk_resora": (0.14, 82.2, 86.5, 65.7, 78.1),
    "table3=swin_dtl_plus": (0.09, 82.2, 86.5, 65.7, 78.1),
    "table3=swin_dtl_plus_resora": (0.09, 82.2, 86.5, 65.7, 78.1),
    "table3=convnext_lora": (0.58, 82.7, 85.6, 64.7, 77.7),
    "table3=convnext_lora_resora": (0.58, 82.7, 85.6, 64.7, 77.7),
}
# What trains on average over the data sets, in millions, where it is not the published number: the header says why.
OTHERWISE = {
    "table2=moslora": 0.44,
    "table2=dtl_plus": 0.05,
    "table3=swin_fact_tk": 0.08,
    "table3=swin_dtl_plus": 0.13,
    "table3=convnext_lora": 0.54,
}
BACKBONES = {"table2": "vit_b16", "table3=swin": "swin_b", "table3=convnext": "convnext_b"}


def path(row: str) -> Path:
    return CONF / f"{row.replace('=', '/')}.yaml"


def composed(row: str, *more: str) -> dict[str, Any]:
    return compose("train_classification", [row, "seed=3", *more])


def test_every_row_has_a_file() -> None:
    files = {f"{file.parent.name}={file.stem}" for group in ("table2", "table3") for file in (CONF / group).iterdir()}
    assert files == PUBLISHED.keys()


@pytest.mark.parametrize("row", PUBLISHED)
def test_a_row(row: str) -> None:
    header = "".join(line for line in path(row).read_text().splitlines(True) if line.startswith("#"))
    assert f"python scripts/train_classification.py {row} data.dataset=cifar\n" in header
    (published,) = re.findall(r"# published: (.*)\n", header)
    assert [float(number) for number in re.findall(r"[\d.]+\b", published)] == pytest.approx(PUBLISHED[row])

    config = composed(row, "data.dataset=kitti")
    experiment = Experiment.of(config)
    (backbone,) = (name for start, name in BACKBONES.items() if row.startswith(start))
    assert (experiment.data, experiment.data_options["dataset"], experiment.seed) == ("vtab", "kitti", 3)
    assert experiment.model["name"] == backbone and row.split("=")[1].endswith(
        experiment.adapter.name + "_resora" * (experiment.regularizer is not None)
    )
    rates = config["trainer"]["rates"]
    used = config["adapter"] | {"drop_path": config["model"]["drop_path"], "rate": rates["head"]} | rates
    own = config.get("by_dataset", {}).get("kitti", {})
    assert own == {key: used[key] for key in own}
    assert [stage.epochs for stage in experiment.recipe.stages] == [100] * (1 + row.endswith("_resora"))
    assert experiment.recipe.selection == "last" and experiment.data_options["train"] == "train800val200"
    if row.endswith("_resora"):  # its first stage is the whole of the row without
        plain = composed(row.removesuffix("_resora"), "data.dataset=kitti")
        different = {key for key in config if config[key] != plain[key]}
        assert different == {"regularizer", "trainer"} and experiment.regularizer is not None
        assert experiment.regularizer.measure == "linear"
        stages = plain["trainer"].pop("stages"), config["trainer"].pop("stages")
        assert plain["trainer"] == config["trainer"] and stages[0]["adapt"] == stages[1]["adapt"]


@pytest.mark.parametrize("row", [row for row in PUBLISHED if not row.endswith(("_resora", "noah"))])
def test_what_a_row_trains(row: str) -> None:
    """Without the head, and as the mean over the data sets where each has its own settings; NOAH's in its own test."""
    config = composed(row)
    datasets = config.get("by_dataset", {"cifar": {}})  # of each, what is asked of it in place of the settings
    assert datasets.keys() in ({"cifar"}, VTAB_1K.keys())
    of_adapter = [{**config["adapter"], **_only(own, config["adapter"])} for own in datasets.values()]
    counts: dict[str, int] = {}
    for settings in of_adapter:
        if str(settings) not in counts:
            with torch.device("meta"):
                model = timm.create_model(config["model"]["architecture"], num_classes=0)
            counts[str(settings)] = trainable_parameters(inject(model, choose("adapter", ADAPTERS, settings)))
    trained = sum(counts[str(settings)] for settings in of_adapter) / len(of_adapter)
    published, text = PUBLISHED[row][0], path(row).read_text()
    if row in OTHERWISE:
        assert round(trained / 1e6, 2) == OTHERWISE[row] != published
        assert f"{trained / 1e6:.2f} M" in text or f"{trained:,.0f}" in text
    else:
        assert round(trained / 1e6, 1 if published > 10 else 2) == published


def _only(settings: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key in known}


def test_pixels_are_those_that_the_weights_know() -> None:
    """timm's own record of each architecture's pretraining; a row may ask for others."""
    half, imagenet = ((0.5,) * 3, (0.5,) * 3), (timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD)
    tags = {"vit_b16": "orig_in21k", "swin_b": "ms_in22k", "convnext_b": "fb_in22k"}
    for model, tag in tags.items():
        config = compose("train_classification", ["data=vtab", f"model={model}", "adapter=linear", "regularizer=none"])
        pretrained = timm.get_pretrained_cfg(f"{config['model']['architecture']}.{tag}")
        expected = {"half": half, "imagenet": imagenet}[config["data"]["normalization"]]
        assert pretrained is not None and (pretrained.mean, pretrained.std) == expected
    asked = composed("table2=fact_tk")["data"]["normalization"], composed("table2=lora")["data"]["normalization"]
    assert asked == ("imagenet", "half")
    few = compose("train_classification", ["table2=lora_resora", "data=few_shot", "trainer=few_shot"])
    assert few["data"]["name"] == "few_shot" and few["trainer"]["selection"] == "validation"

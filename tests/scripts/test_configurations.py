"""Every adapter and regularizer has a configuration that both commands compose, validate and offer in full."""

from __future__ import annotations

import copy
import dataclasses
import functools
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))  # as for `python scripts/train_retrieval.py`

from command_line import CONF, compose

from adapters import ADAPTERS
from classification.experiment import Experiment as Classification
from regularizers import REGULARIZERS
from retrieval.experiment import Experiment as Retrieval
from retrieval.models import build_model
from training.schedules import SCHEDULES


def test_each_has_a_file() -> None:
    assert {path.stem for path in (CONF / "adapter").glob("*.yaml")} == set(ADAPTERS)
    assert {path.stem for path in (CONF / "regularizer").glob("*.yaml")} == {*REGULARIZERS, "none"}


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter(name: str) -> None:
    config = compose("train_retrieval", [f"adapter={name}", "regularizer=none"])
    settings = {field.name for field in dataclasses.fields(ADAPTERS[name])}
    assert set(config["adapter"]) == {"name", *settings}, "every setting can be found in the file"
    assert isinstance(Retrieval.of(config).adapter, ADAPTERS[name])

    config = compose("train_classification", [f"adapter={name}", "regularizer=none"])
    adapter = Classification.of(config).adapter
    assert isinstance(adapter, ADAPTERS[name])
    assert getattr(adapter, "targets", ("q", "k", "v")) == ("q", "k", "v")


@pytest.mark.parametrize("name", REGULARIZERS)
def test_a_regularizer(name: str) -> None:
    experiment = Retrieval.of(compose("train_retrieval", [f"regularizer={name}"]))
    assert experiment.regularizer is not None and experiment.regularizer.measure == name
    with pytest.raises(ValueError, match="adapter=bitfit has none"):
        Retrieval.of(compose("train_retrieval", [f"regularizer={name}", "adapter=bitfit"]))


LOW_RANK = ["lora", "moslora", "adalora", "fact_tt", "fact_tk", "dtl", "dtl_plus", "houlsby", "adaptformer", "noah"]


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_regularizer_goes_with_every_low_rank_adapter_in_one_line(name: str) -> None:
    config = compose("train_classification", [f"adapter={name}", "regularizer=nonlinear"])
    if name in LOW_RANK:
        assert Classification.of(config).regularizer is not None
    else:
        with pytest.raises(ValueError, match=f"adapter={name} has none"):
            Classification.of(config)


@pytest.mark.parametrize(
    "recipe", ["coco", "digits", "few_shot", "flickr30k", "msrvtt", "openmoji", "openmoji_clips", "vtab"]
)
def test_one_override_changes_the_schedule_of_a_recipe(recipe: str) -> None:
    """The recipe follows from the data, as in a command; step has settings that no other schedule takes."""
    command, experiment = (
        ("train_classification", Classification)
        if recipe in ("digits", "few_shot", "vtab")
        else ("train_retrieval", Retrieval)
    )
    model = ["model=clip4clip"] if recipe in ("msrvtt", "openmoji_clips") else []
    other = "cosine" if recipe in ("coco", "flickr30k") else "step"
    config = compose(command, [f"data={recipe}", *model, f"trainer/schedule={other}"])
    assert config["trainer"]["schedule"] == {"name": other} | ({"at": [15], "factor": 0.1} if other == "step" else {})
    assert isinstance(experiment.of(config).recipe.schedule, SCHEDULES[other])  # type: ignore[arg-type]


def test_each_schedule_has_a_file() -> None:
    assert {path.stem for path in (CONF / "trainer/schedule").glob("*.yaml")} == set(SCHEDULES)
    overrides = ["trainer/schedule=step", "trainer.schedule.at=[3, 4]"]
    assert compose("train_retrieval", overrides)["trainer"]["schedule"] == {"name": "step", "at": [3, 4], "factor": 0.1}


@pytest.fixture(scope="module")
def composed() -> list[tuple[Any, dict[str, Any]]]:
    return [(Retrieval, compose("train_retrieval", [])), (Classification, compose("train_classification", []))]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"trainer.stages.regularize.epochs": 0},
            r"regularizer=linear, but no stage that trains has regularize=true .*is adapt\).*use regularizer=none",
        ),
        (
            {"trainer.stages.regularize.regularize": False},
            r"\(there is adapt, regularize\): nothing would be penalised",
        ),
        ({"trainer.restart": False, "start_from": "runs/other"}, "both runs need trainer.restart=true"),
        ({"trainer.precision": "bf16"}, "precision is 'bf16'; expected one of float32, bfloat16"),
        ({"trainer.threads": 0}, "threads is 0; expected at least 1"),
        ({"trainer.batch_size": "x"}, r"trainer\.batch_size is 'x'; expected a whole number$"),
        ({"trainer.batch_size": True}, r"trainer\.batch_size is True; expected a whole number$"),
        ({"trainer.warmup": "1O"}, r"trainer\.warmup is '1O'; expected a number$"),
        ({"trainer.chunk_size": "no"}, r"trainer\.chunk_size is 'no'; expected a whole number or null$"),
        ({"trainer.restart": "never"}, r"trainer\.restart is 'never'; expected true or false$"),
        ({"trainer.rates.head": "fast"}, r"trainer\.rates\.head is 'fast'; expected a number$"),
        (
            {"trainer.stages.adapt.regularize": "x"},
            r"trainer\.stages\.adapt\.regularize is 'x'; expected true or false$",
        ),
        ({"trainer.selection_metric": "MedR"}, "selection_metric=MedR and selection=last do not go together"),
        (
            {"trainer.selection": "validation", "trainer.selection_metric": "t2i_MedR"},
            r"unknown trainer\.selection_metric 't2i_MedR'.* choose from (rsum, i2t_R@1, .*|accuracy)$",
        ),
        ({"seed": 1.5}, r"seed is 1\.5; expected a whole number$"),
    ],
)
def test_what_cannot_be_run_is_refused(
    composed: list[tuple[Any, dict[str, Any]]], changes: dict[str, Any], message: str
) -> None:
    for experiment, config in composed:
        with pytest.raises(ValueError, match=message):
            experiment.of(changed(config, changes))


def test_sizes_of_a_model_are_numbers(tmp_path: Path) -> None:
    for model, holds, size in (
        ("vse_infty", torch.zeros(2, 3), "embed_dim"),
        ("vse_infty", torch.zeros(2, 3), "text_buckets"),
        ("clip4clip", torch.zeros(1, 3, 2, 2), "max_frames"),
    ):
        data = SimpleNamespace(name="some", visual=lambda index, holds=holds: holds)
        with pytest.raises(ValueError, match=rf"model\.{size} is 'x'; expected a whole number$"):
            build_model({"name": model, size: "x"}, cast(Any, data), tmp_path)
        with pytest.raises(ValueError, match=f"model={model} does not take these settings: .*'{size}s'"):
            build_model({"name": model, f"{size}s": 1}, cast(Any, data), tmp_path)


def test_one_logger_needs_no_list(composed: list[tuple[Any, dict[str, Any]]]) -> None:
    for experiment, config in composed:
        for loggers in ("tensorboard", ["tensorboard"]):
            assert experiment.of(changed(config, {"trainer.report_to": loggers})).recipe.report_to == ("tensorboard",)


def test_without_a_penalty_no_stage_has_to_regularize(composed: list[tuple[Any, dict[str, Any]]]) -> None:
    for experiment, config in composed:
        without = changed(config, {"trainer.stages.regularize.epochs": 0, "regularizer": {"name": "none"}})
        assert experiment.of(without).regularizer is None


def changed(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    config = copy.deepcopy(config)
    for path, value in changes.items():
        *above, key = path.split(".")
        functools.reduce(dict.__getitem__, above, config)[key] = value
    return config

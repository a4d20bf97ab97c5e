"""Every setting of a configuration arrives in what trains, and changes nothing else there."""

from __future__ import annotations

import dataclasses
import functools
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))  # as for `python scripts/train_retrieval.py`

from command_line import compose
from test_configurations import changed

from classification.experiment import Experiment as Classification
from regularizers import REGULARIZERS, ReSoRA
from retrieval.experiment import Experiment as Retrieval
from training import LearningRates, Recipe, Stage
from training.schedules import Step

TASKS: dict[str, Any] = {"train_retrieval": Retrieval, "train_classification": Classification}

# Of each field of a recipe: a setting that no recipe of the embedded data has, and what is to come of it.
RECIPE: dict[str, tuple[Any, Any]] = {
    "stages": (
        {"first": {"epochs": 3, "regularize": False}, "second": {"epochs": 4, "regularize": True}},
        (Stage(name="first", epochs=3), Stage(name="second", epochs=4, regularize=True)),
    ),
    "batch_size": (7, 7),
    "rates": (
        {"adapter": 0.1, "head": 0.2, "backbone": 0.3, "weight_decay": 0.4, "decay_vectors": True},
        LearningRates(adapter=0.1, head=0.2, backbone=0.3, weight_decay=0.4, decay_vectors=True),
    ),
    "optimizer": ("bert_adam", "bert_adam"),
    "schedule": ({"name": "step", "at": [3, 5], "factor": 0.2}, Step(at=(3, 5), factor=0.2)),
    "warmup": (0.37, 0.37),
    "max_grad_norm": (0.7, 0.7),
    "selection": ("validation", "validation"),
    "evaluate_every": (3, 3),
    "restart": (False, False),
    "chunk_size": (5, 5),
    "save_minutes": (12.5, 12.5),
    "workers": (3, 3),
    "report_to": (["tensorboard", "wandb"], ("tensorboard", "wandb")),
}
REGULARIZER = {
    "weight": 0.3, "beta": 2.0, "sigma_fraction": 0.5, "centered": True, "transposed": True, "on": "weights",
    "samples": "mean", "layers": "blocks", "reduction": "sum",
}  # fmt: skip
REST: dict[str, tuple[Any, Any]] = {
    "trainer.threads": (3, 3), "trainer.precision": ("bfloat16", "bfloat16"), "seed": (5, 5),
    "start_from": ("a", Path("a")), "root": ("b", Path("b")), "runs": ("c", Path("c")),
}  # fmt: skip


@functools.cache
def default(command: str) -> dict[str, Any]:
    return compose(command, [])


@pytest.mark.parametrize("command", TASKS)
@pytest.mark.parametrize("key", [field.name for field in dataclasses.fields(Recipe)])
def test_of_a_recipe(command: str, key: str) -> None:
    experiment, config = TASKS[command], default(command)
    if key == "selection_metric":
        config = changed(config, {"trainer.selection": "validation"})
        given = expected = experiment.metrics[-1]
    else:
        given, expected = RECIPE[key]
    before, after = (experiment.of(each).recipe for each in (config, changed(config, {f"trainer.{key}": given})))
    assert after == dataclasses.replace(before, **{key: expected}) != before


@pytest.mark.parametrize("command", TASKS)
@pytest.mark.parametrize("name", REGULARIZERS)
def test_of_a_regularizer(command: str, name: str) -> None:
    def settings(penalty: ReSoRA) -> dict[str, Any]:
        return {key: value for key, value in vars(penalty).items() if key != "parameters"} | penalty.parameters

    experiment, config = TASKS[command], compose(command, [f"regularizer={name}"])
    before = settings(experiment.of(config).regularizer)
    assert before.keys() == {"measure", *config["regularizer"]} - {"name"}
    for key in set(config["regularizer"]) - {"name"}:
        after = experiment.of(changed(config, {f"regularizer.{key}": REGULARIZER[key]})).regularizer
        assert settings(after) == before | {key: REGULARIZER[key]} != before


@pytest.mark.parametrize("command", TASKS)
def test_of_a_run(command: str) -> None:
    def settings(config: dict[str, Any]) -> dict[str, Any]:
        experiment = TASKS[command].of(config)
        return {key: getattr(experiment, key.removeprefix("trainer.")) for key in REST}

    config = default(command)
    before = settings(config)
    for key, (given, expected) in REST.items():
        assert settings(changed(config, {key: given})) == before | {key: expected} != before


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("msrvtt_full", ("bert_adam", 0.1, 1.0)),  # CLIP4Clip
        ("flickr30k_full", ("adamw", 0.0, 2.0)),  # VSE-infinity
    ],
)
def test_published_recipes_are_those_that_train(row: str, expected: tuple[str, float, float]) -> None:
    recipe = Retrieval.of(compose("train_retrieval", [f"table1={row}"])).recipe
    assert (recipe.optimizer, recipe.warmup, recipe.max_grad_norm) == expected

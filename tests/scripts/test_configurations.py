"""Every adapter and regularizer has a configuration that both commands compose, validate and offer in full."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))  # as for `python scripts/train_retrieval.py`

from command_line import CONF, compose

from adapters import ADAPTERS
from classification.experiment import Experiment as Classification
from regularizers import REGULARIZERS
from retrieval.experiment import Experiment as Retrieval


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

"""One run of classification fine-tuning, as plain validated values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from classification.data import DATASETS
from classification.data.listed import ListedImages
from classification.models import MODELS
from training import BaseExperiment, check_name, shared_settings
from training.experiment import settings_of_this_version


@dataclass(frozen=True, kw_only=True)
class Experiment(BaseExperiment):
    """What to train on what, and how. Made from the nested mapping that `config.yaml` of a run holds."""

    task: ClassVar[str] = "classification"
    metrics: ClassVar[tuple[str, ...]] = ("accuracy",)

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Experiment:
        """Validate a configuration before any work begins.

        Raises:
            ValueError: for a name or value that does not exist; the message says what does.
            Unrestorable: for a configuration that another version of the suite wrote.
        """
        with settings_of_this_version():
            check_name("data", config["data"]["name"], DATASETS)
            kind = DATASETS[config["data"]["name"]]
            if issubclass(kind, ListedImages):  # first: a recipe may have no rate for what is not published
                kind.check(config["data"])
            return cls(**shared_settings(config, datasets=DATASETS, models=MODELS, metrics=cls.metrics))

    @property
    def levels(self) -> tuple[str, ...]:
        """The levels of the run's folder; a collection of data sets has one for each ("vtab-cifar")."""
        task, data, *rest = super().levels
        parts = [str(self.data_options[key]) for key in ("dataset", "shots") if key in self.data_options]
        return task, "-".join([data, *parts]), *rest

"""One run of retrieval fine-tuning, as plain validated values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from eval.metrics import RECALL_KEYS
from retrieval.batch import PAIRINGS, Augmentation
from retrieval.data import DATASETS
from retrieval.losses import LOSSES
from retrieval.models import MODELS
from training import BaseExperiment, choose, shared_settings
from training.experiment import settings_of_this_version


@dataclass(frozen=True, kw_only=True)
class Experiment(BaseExperiment):
    """What to train on what, and how. Made from the nested mapping that `config.yaml` of a run holds."""

    task: ClassVar[str] = "retrieval"
    metrics: ClassVar[tuple[str, ...]] = ("rsum", *RECALL_KEYS)
    max_length: int | None
    loss: Callable[..., Any]
    pairing: str
    augmentation: Augmentation | None

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Experiment:
        """Validate a configuration before any work begins.

        Raises:
            ValueError: for a name or value that does not exist; the message says what does.
            Unrestorable: for a configuration that another version of the suite wrote.
        """
        with settings_of_this_version():
            return cls(**cls._settings(config))

    @staticmethod
    def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
        settings = shared_settings(config, datasets=DATASETS, models=MODELS, metrics=Experiment.metrics)
        protocol, model = config.get("protocol", {}).get("name", "mended"), settings["model"]["name"]
        if protocol != "mended" and model != "vse_infty":
            raise ValueError(
                f"protocol={protocol} has the mistakes of VSE-infinity's published code back, and model={model} has "
                "none of them; use protocol=mended"
            )
        trainer, augmentation = config["trainer"], config["trainer"].get("augmentation")
        if trainer["pairing"] not in PAIRINGS:
            raise ValueError(f"trainer.pairing is {trainer['pairing']!r}; expected one of {', '.join(PAIRINGS)}")
        return settings | {
            "max_length": settings["model"].pop("max_length"),
            "loss": choose("loss", LOSSES, config["loss"]),
            "pairing": trainer["pairing"],
            "augmentation": Augmentation(**augmentation) if augmentation else None,
        }

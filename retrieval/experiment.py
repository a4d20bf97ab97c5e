"""One run of retrieval fine-tuning, as plain validated values."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from adapters import ADAPTERS, Adapter
from regularizers import REGULARIZERS, ReSoRA
from retrieval.batch import PAIRINGS, Augmentation
from retrieval.data import DATASETS
from retrieval.losses import LOSSES
from retrieval.models import MODELS
from training import LearningRates, Recipe, Stage

T = TypeVar("T")
LOW_RANK = ("lora",)


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What to train on what, and how. Made from the nested mapping that `config.yaml` of a run holds."""

    data: str
    data_options: dict[str, Any]
    model: dict[str, Any]
    max_length: int | None
    loss: Callable[..., Any]
    adapter: Adapter
    regularizer: ReSoRA | None
    recipe: Recipe
    pairing: str
    augmentation: Augmentation | None
    threads: int | None
    precision: str | None
    seed: int
    root: Path
    runs: Path

    @property
    def cache(self) -> Path:
        """Where the pretrained encoders are kept."""
        return self.root / "cache"

    @property
    def levels(self) -> tuple[str, ...]:
        """The levels of the run's folder below `runs`."""
        penalty = self.regularizer.measure if self.regularizer else "none"
        return ("retrieval", self.data, self.model["name"], self.adapter.name, penalty, f"seed{self.seed}")

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Experiment:
        """Validate a configuration before any work begins.

        Raises:
            ValueError: for a name or value that does not exist; the message says what does.
        """
        data, model, trainer = dict(config["data"]), dict(config["model"]), dict(config["trainer"])
        penalty, augmentation = dict(config["regularizer"]), trainer.get("augmentation")
        adapter = choose("adapter", ADAPTERS, config["adapter"])
        if penalty["name"] != "none" and adapter.name not in LOW_RANK:
            raise ValueError(
                f"regularizer={penalty['name']} penalises the subspaces of a low-rank adapter, and "
                f"adapter={adapter.name} has none; use regularizer=none, or one of adapter={', '.join(LOW_RANK)}"
            )
        if trainer["pairing"] not in PAIRINGS:
            raise ValueError(f"trainer.pairing is {trainer['pairing']!r}; expected one of {', '.join(PAIRINGS)}")
        for kind, name, known in (("data", data["name"], DATASETS), ("model", model["name"], MODELS)):
            _check(kind, name, known)
        data.pop("prepare", None)  # how the data were made is checked by their fingerprint
        return cls(
            data=data.pop("name"),
            data_options=data,
            loss=choose("loss", LOSSES, config["loss"]),
            max_length=model.pop("max_length"),
            model=model,
            adapter=adapter,
            regularizer=None if penalty["name"] == "none" else ReSoRA(penalty["name"], weight=penalty["weight"]),
            recipe=Recipe(
                stages=tuple(Stage(name=name, **settings) for name, settings in trainer["stages"].items()),
                rates=LearningRates(**trainer["rates"]),
                **{key: trainer[key] for key in ("batch_size", "warmup", "max_grad_norm", "selection", "workers")},
                report_to=tuple(trainer["report_to"]),
            ),
            pairing=trainer["pairing"],
            augmentation=Augmentation(**augmentation) if augmentation else None,
            threads=trainer["threads"],
            precision=trainer["precision"],
            seed=config["seed"],
            root=Path(config["root"]),
            runs=Path(config["runs"]),
        )


def choose(kind: str, known: Mapping[str, Callable[..., T]], settings: Mapping[str, Any]) -> T:
    """{"name": ..., **settings} -> the named thing with its settings.

    Raises:
        ValueError: for an unknown name (with a suggestion) or setting.
    """
    settings = dict(settings)
    name = settings.pop("name")
    _check(kind, name, known)
    try:
        return known[name](**settings)
    except TypeError as error:
        raise ValueError(f"{kind}={name} does not take these settings: {error}") from None


def _check(kind: str, name: str, known: Mapping[str, Any]) -> None:
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ";"
        raise ValueError(f"unknown {kind} {name!r}{hint} choose from {', '.join(known)}")


assert set(LOW_RANK) <= set(ADAPTERS) and "none" not in REGULARIZERS

"""What every run is asked for, whatever its task: data, model, adapter, regularizer, recipe, seed, places."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from adapters import ADAPTERS, Adapter
from regularizers import ReSoRA
from training.choose import check_name, check_types, choose
from training.hardware import check_hardware
from training.optimizers import LearningRates
from training.run import Unrestorable
from training.schedules import SCHEDULES
from training.stages import Recipe, Stage

LOW_RANK = tuple(name for name, kind in ADAPTERS.items() if hasattr(kind, "stored_subspaces"))


@dataclass(frozen=True, kw_only=True)
class BaseExperiment:
    """The part of a task's `Experiment` that all tasks share.

    Args:
        data: name of the data set.
        data_options: its further settings.
        model: name and settings of the model.
        adapter: what is trained besides the heads.
        regularizer: what is penalised in the stages that regularize, or None.
        recipe: how to optimise.
        threads, precision: as of `choose_hardware`; None is measured.
        seed: of first values, batches and dropout.
        start_from: a run whose first stage this one goes on from, instead of training it again; or None.
        root: folder of data sets and pretrained encoders.
        runs: folder of run folders.
    """

    task: ClassVar[str]
    metrics: ClassVar[tuple[str, ...]]
    """What "validation" may select by; the first, unless the recipe says otherwise. The greater the better."""
    data: str
    data_options: dict[str, Any]
    model: dict[str, Any]
    adapter: Adapter
    regularizer: ReSoRA | None
    recipe: Recipe
    threads: int | None
    precision: str | None
    seed: int
    start_from: Path | None
    root: Path
    runs: Path

    @property
    def cache(self) -> Path:
        """Where the pretrained encoders are kept."""
        return self.root / "cache"

    @property
    def metric(self) -> str:
        """The validation metric that selects the best epoch, and that is printed after each."""
        return self.recipe.selection_metric or self.metrics[0]

    @property
    def levels(self) -> tuple[str, ...]:
        """The levels of the run's folder below `runs`."""
        penalty = self.regularizer.measure if self.regularizer else "none"
        return (self.task, self.data, self.model["name"], self.adapter.name, penalty, f"seed{self.seed}")


@contextmanager
def settings_of_this_version() -> Iterator[None]:
    """While a configuration is read: what it lacks is told as `Unrestorable`, where a bare KeyError would say "x"."""
    try:
        yield
    except KeyError as error:
        raise Unrestorable(f"the configuration lacks {error}: another version of the suite wrote it") from error


def shared_settings(
    config: Mapping[str, Any], *, datasets: Iterable[str], models: Iterable[str], metrics: Iterable[str]
) -> dict[str, Any]:
    """The arguments of `BaseExperiment` from a configuration (see `scripts/conf`), checked before any work begins.

    Args:
        config: nested mapping with the groups data, model, adapter, regularizer and trainer; more is left to the task.
        datasets: the names that the task knows.
        models: likewise.
        metrics: what it may select by.

    Raises:
        ValueError: for a name or value that does not exist; the message says what does.
    """
    data, model, trainer = dict(config["data"]), dict(config["model"]), config["trainer"]
    for kind, name, known in (("data", data["name"], datasets), ("model", model["name"], models)):
        check_name(kind, name, known)
    adapter = choose("adapter", ADAPTERS, config["adapter"])
    penalty = dict(config["regularizer"])
    measure = penalty.pop("name")
    if measure != "none" and adapter.name not in LOW_RANK:
        raise ValueError(
            f"regularizer={measure} penalises the subspaces of a low-rank adapter, and "
            f"adapter={adapter.name} has none; use regularizer=none, or one of adapter={', '.join(LOW_RANK)}"
        )
    recipe = _recipe(trainer)
    if recipe.selection_metric is not None:
        check_name("trainer.selection_metric", recipe.selection_metric, metrics)
    if measure != "none" and not any(stage.regularize for stage in recipe.stages):
        raise ValueError(
            f"regularizer={measure}, but no stage that trains has regularize=true (there is "
            f"{', '.join(stage.name for stage in recipe.stages)}): nothing would be penalised; use regularizer=none"
        )
    if config["start_from"] and not recipe.restart:
        raise ValueError(
            "start_from takes over the weights of a stage alone, and trainer.restart=false goes on with its optimiser "
            "too; both runs need trainer.restart=true"
        )
    check_hardware(trainer["threads"], trainer["precision"])
    check_types("", BaseExperiment, {"seed": config["seed"]})
    data.pop("prepare", None)  # how the data were made is checked by their fingerprint
    return {
        "data": data.pop("name"),
        "data_options": data,
        "model": model,
        "adapter": adapter,
        "regularizer": None if measure == "none" else ReSoRA(measure, **penalty),
        "recipe": recipe,
        "threads": trainer["threads"],
        "precision": trainer["precision"],
        "seed": config["seed"],
        "start_from": Path(config["start_from"]) if config["start_from"] else None,
        "root": Path(config["root"]),
        "runs": Path(config["runs"]),
    }


def _recipe(trainer: Mapping[str, Any]) -> Recipe:
    """The group trainer of a configuration, without the stages of no epochs."""
    trained = {name: settings for name, settings in trainer["stages"].items() if settings["epochs"] != 0}
    own = {
        key: trainer[key]
        for key in (
            "batch_size",
            "optimizer",
            "warmup",
            "max_grad_norm",
            "selection",
            "evaluate_every",
            "restart",
            "chunk_size",
            "workers",
        )
    }
    loggers = trainer["report_to"]
    own |= {key: trainer.get(key) for key in ("save_minutes", "selection_metric")}  # runs of earlier versions have none
    check_types("trainer.", Recipe, own)
    check_types("trainer.rates.", LearningRates, trainer["rates"])
    for name, settings in trained.items():
        check_types(f"trainer.stages.{name}.", Stage, settings)
    return Recipe(
        stages=tuple(Stage(name=name, **settings) for name, settings in trained.items()),
        rates=LearningRates(**trainer["rates"]),
        schedule=choose("schedule", SCHEDULES, trainer["schedule"]),
        report_to=(loggers,) if isinstance(loggers, str) else tuple(loggers),
        **own,
    )

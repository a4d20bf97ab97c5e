"""A run of one task from its configuration to its metrics: what retrieval and classification do in the same order."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from adapters import save
from regularizers import Subspaces
from training.experiment import BaseExperiment
from training.hardware import check_devices
from training.record import Clock, clock, describe, hardware_for, heat_maps, record_redundancy
from training.run import WEIGHTS, RunFolder, is_first_process
from training.stages import check_items, run_stages

E = TypeVar("E", bound=BaseExperiment)
T = TypeVar("T", bound="Task[Any]")


class Task(ABC, Generic[E]):
    """What is trained, and how it is measured. A subclass assembles data and model when it is made.

    Attributes:
        to_hold_out: the setting that holds data out for validation, for a message.
        experiment: what was asked for.
        model: with a fresh adapter in it.
        heads: the parts of the model that train beside the adapter.
        items: the training data.
        collate: several of them -> the arguments of the model's forward pass. Has to be picklable: workers that load
            data receive a copy.
        objective: (the model's outputs, epochs since training began) -> {name: scalar loss}; the losses are summed.
        sizes: of the splits, as run.json has them: {"images": {split: number}}.
        fingerprint: as of `fingerprint_of`.
        preprocessing: how files became what the model takes.
        frozen_elsewhere: parameters of the backbone that `model` does not hold, because their outputs are cached.
    """

    to_hold_out: ClassVar[str]
    experiment: E
    model: nn.Module
    heads: tuple[str, ...]
    items: Dataset
    collate: Callable[[list[Any]], dict[str, Tensor]]
    objective: Callable[[Any, float], Mapping[str, Tensor]]
    sizes: dict[str, dict[str, int]]
    fingerprint: str
    preprocessing: str
    frozen_elsewhere: int = 0

    @abstractmethod
    def __init__(self, experiment: E) -> None:
        """Raises FileNotFoundError or ValueError for what cannot be trained; nothing is written by then."""

    @classmethod
    @abstractmethod
    def fingerprint_of(cls, experiment: E) -> str:
        """SHA-256 over the data, without a model."""

    @abstractmethod
    def evaluate(self, split: str, precision: str) -> dict[str, float]:
        """The metrics of the model on a split, by key; those that select are the experiment's `metrics`."""

    @abstractmethod
    def chance(self, split: str) -> dict[str, float]:
        """What a guess would score, by the same keys."""

    @abstractmethod
    def probe(self) -> dict[str, Subspaces]:
        """The subspaces of every low-rank layer on the first items held out for validation, or of training if none."""

    def further_metrics(self, run: RunFolder, precision: str) -> dict[str, Any]:
        """What else goes into metrics.json, once all that is asked for above is measured."""
        return {}

    @property
    def validates(self) -> bool:
        """Whether anything is held out for validation."""
        return self.sizes["images"]["validation"] > 0


def run_task(config: Mapping[str, Any], experiment: E, task_type: type[T]) -> tuple[RunFolder, T | None]:
    """Train and evaluate one experiment; a finished one is left as it is, a killed one goes on.

    Args:
        config: what `experiment` was made from, for the run's folder.
        experiment: what is asked for.
        task_type: the task to train; called with `experiment`, it loads data and model.

    Returns:
        The run's folder, with metrics.json and adapter.safetensors, and the task with its trained model, or None where
        the run was finished before. Of several processes the first one evaluates and writes, and the others return
        before.

    Raises:
        ValueError, FileNotFoundError: for a bad configuration, data that is not prepared, or a run that another process
            trains at this moment, before anything is written.
    """
    run = RunFolder.of(experiment.runs, *experiment.levels)
    run.check(config)
    if run.finished:
        run.drop_checkpoints()  # of a run that was killed just then
        if not run.asked_for_these_data(config):
            run.check_data(task_type.fingerprint_of(experiment))
        return run, None

    check_devices()
    recipe, first_stage = experiment.recipe, experiment.recipe.stages[0].name
    if experiment.start_from:
        run.check_source(first_stage, experiment.start_from, config)
    with ExitStack() as held:
        if begun := run.begun:  # told before the data are loaded, which may take minutes
            held.enter_context(run.alone())
        watch = Clock(run, "load data and encoders")
        task = task_type(experiment)
        check_items(len(task.items), recipe.batch_size)  # type: ignore[arg-type]
        _check_selection(task)
        if experiment.start_from and not run.has_trained(first_stage):
            RunFolder(experiment.start_from).check_data(task.fingerprint)
        if not begun:  # the folder appears when nothing is wrong with what was asked for
            held.enter_context(run.alone())
        run.check_data(task.fingerprint)
        watch.tick()
        _train(config, experiment, task, run)
    return run, task


def _train(config: Mapping[str, Any], experiment: BaseExperiment, task: Task[Any], run: RunFolder) -> None:
    """From the loaded data and model to metrics.json, in a run that no other process trains."""
    recipe, first_stage = experiment.recipe, experiment.recipe.stages[0].name
    if is_first_process():  # the others may belong to a second launch, whose first one is being refused
        run.begin(config)
    if experiment.start_from:
        run.adopt_stage(first_stage, experiment.start_from)
    on_test = experiment.data_options.get("validation") == "test"
    hardware = hardware_for(run, experiment)
    describe(
        run,
        experiment,
        task.model,
        hardware,
        data={"fingerprint": task.fingerprint, **task.sizes},
        preprocessing=task.preprocessing,
        metric=experiment.metric,
        selected_on="the test split (data.validation=test, as in prior work)" if on_test else "validation",
        frozen_elsewhere=task.frozen_elsewhere,
    )
    torch.set_num_threads(hardware.threads)
    precision = hardware.precision
    probed: list[dict[str, Tensor]] = []

    with clock(run, "train") as watch:
        run_stages(
            task.model,
            recipe,
            run,
            dataset=task.items,
            collate=task.collate,
            objective=task.objective,
            evaluator=(lambda trained: task.evaluate("validation", precision)) if task.validates else None,
            metric=experiment.metric,
            heads=task.heads,
            regularizer=experiment.regularizer,
            hardware=hardware,
            seed=experiment.seed,
            after_stage=lambda: probed.append(heat_maps(task.probe())),
            after_epoch=watch.tick,
        )
    if not is_first_process():  # the rest is for one alone; none waits, so that it may take its time
        return
    save(task.model, run.path / WEIGHTS)

    with clock(run, "evaluate"):
        ends = ("validation", "test") if task.validates else ("test",)
        metrics: dict[str, Any] = {split: task.evaluate(split, precision) for split in ends}
        metrics["chance"] = {split: task.chance(split) for split in ends}
        if on_test:
            metrics["validation_is"] = "test"  # so that metrics.json says so without run.json beside it
        metrics |= record_redundancy(run, probed)
        metrics |= task.further_metrics(run, precision)
    run.finish(metrics)


def _check_selection(task: Task[Any]) -> None:
    """Raise ValueError if the recipe selects on validation, and nothing is held out."""
    if task.experiment.recipe.selection == "validation" and not task.validates:
        raise ValueError(
            f"trainer.selection=validation, but data={task.experiment.data} holds nothing out for validation; use "
            f"trainer.selection=last, or a setting that holds some out ({task.to_hold_out})"
        )

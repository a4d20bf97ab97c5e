"""What is compared with what: tasks, methods, seeds, and the grid that validation chooses from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

BASELINE = "LoRA"  # two stages without a penalty; every other method is compared with it
MEASURES = ("euclidean", "cosine", "linear", "nonlinear", "overlap")
WEIGHTS = (1e-3, 1e-2, 1e-1)
BANDWIDTHS = {"euclidean": ("beta", (1.0, 0.1, 10.0)), "nonlinear": ("sigma_fraction", (1.0, 0.5))}  # default first
COMMON = ("trainer.threads=1", "trainer.precision=float32")  # the same on every machine


def epochs(adapt: int, regularize: int) -> tuple[str, str]:
    """Overrides for the lengths of the two stages."""
    return f"trainer.stages.adapt.epochs={adapt}", f"trainer.stages.regularize.epochs={regularize}"


@dataclass(frozen=True, kw_only=True)
class Task:
    """A data set with a model: what to launch and which number counts.

    Attributes:
        command: "train_retrieval" or "train_classification".
        overrides: of its configuration.
        score: the key of metrics.json's "validation" and "test"; higher is better.
        unit: for people.
        seeds: that are reported.
        selection_seeds: with which weights and bandwidths are chosen on validation; not reported.
        by_method: overrides of one method, such as a learning rate, chosen by hand on validation.
        selected_on: another task whose choice is taken over, where a grid of its own would cost too much.
    """

    command: str
    overrides: tuple[str, ...]
    score: str
    unit: str
    seeds: tuple[int, ...]
    selection_seeds: tuple[int, ...] = ()
    by_method: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    selected_on: str | None = None


TASKS = {
    "digits-96": Task(
        command="train_classification",
        overrides=(
            "data=digits",
            "data.train_images=96",
            "trainer.batch_size=16",
            "trainer.evaluate_every=3",
            *epochs(12, 12),
        ),
        score="accuracy",
        unit="accuracy, %",
        seeds=tuple(range(10)),
        selection_seeds=(100, 101, 102),
        by_method={"head only": ("trainer.rates.head=1e-2",)},
    ),
    "digits": Task(
        command="train_classification",
        overrides=("data=digits", *epochs(3, 3)),
        score="accuracy",
        unit="accuracy, %",
        seeds=tuple(range(10)),
        selection_seeds=(100,),
        by_method={"head only": ("trainer.rates.head=1e-2",)},
    ),
    "scenes": Task(
        command="train_retrieval",
        overrides=("data=openmoji", "model=vse_infty", *epochs(2, 2)),
        score="rsum",
        unit="Rsum, 0-600",
        seeds=(0, 1, 2),
        selection_seeds=(100,),
    ),
    "clips": Task(
        command="train_retrieval",
        overrides=("data=openmoji_clips", "model=clip4clip", *epochs(2, 1)),
        score="rsum",
        unit="Rsum, 0-600",
        seeds=(0, 1, 2),
        by_method={"full": ("trainer.rates.backbone=3e-5",)},
        selected_on="scenes",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run. Two jobs with the same key are the same run."""

    task: str
    method: str
    seed: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of the regularizer: weight and bandwidth."""
    selection: bool = False

    @property
    def key(self) -> tuple[Any, ...]:
        settings = tuple(sorted(self.settings.items()))
        return self.task, self.method, self.seed, settings

    @property
    def goes_on_from(self) -> Job | None:
        """The run whose first stage this one shares."""
        if self.method.startswith("+ "):
            return Job(task=self.task, method=BASELINE, seed=self.seed, selection=self.selection)
        return None

    @property
    def overrides(self) -> list[str]:
        measure = self.method.removeprefix("+ ")
        chosen = {
            "head only": ["adapter=linear", "regularizer=none"],
            "full": ["adapter=full", "regularizer=none"],
            BASELINE: ["adapter=lora", "regularizer=none"],
        }.get(self.method, ["adapter=lora", f"regularizer={measure}"])
        chosen += TASKS[self.task].by_method.get(self.method, ())
        chosen += [f"regularizer.{name}={value}" for name, value in self.settings.items()]
        return [*TASKS[self.task].overrides, *COMMON, *chosen, f"seed={self.seed}"]


METHODS = ("head only", BASELINE, *(f"+ {measure}" for measure in MEASURES), "full")


def weight_jobs(task: str) -> list[Job]:
    """First step of the choice: every weight, at the default bandwidth."""
    return [
        Job(task=task, method=f"+ {measure}", seed=seed, settings={"weight": weight}, selection=True)
        for seed in TASKS[task].selection_seeds
        for measure in MEASURES
        for weight in WEIGHTS
    ]


def bandwidth_jobs(task: str, weights: Mapping[str, float]) -> list[Job]:
    """Second step: other bandwidths, at the weight that was best."""
    return [
        Job(
            task=task,
            method=f"+ {measure}",
            seed=seed,
            settings={"weight": weights[measure], name: value},
            selection=True,
        )
        for seed in TASKS[task].selection_seeds
        for measure, (name, values) in BANDWIDTHS.items()
        for value in values[1:]
    ]


def report_jobs(task: str, settings: Mapping[str, Mapping[str, Any]]) -> list[Job]:
    """Every method with every reported seed, seed by seed."""
    return [
        Job(task=task, method=method, seed=seed, settings=settings.get(method.removeprefix("+ "), {}))
        for seed in TASKS[task].seeds
        for method in METHODS
    ]

"""Fine-tune a classification model and leave a run folder: data -> model with adapter -> stages -> metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import default_collate

from adapters import load, save
from classification.assemble import assemble, fingerprint, open_data
from classification.evaluate import Split, evaluate
from classification.experiment import Experiment
from classification.models import Classifier
from eval import chance_accuracy
from regularizers import Subspaces
from training import RunFolder, run_stages
from training.hardware import check_devices
from training.record import (
    PROBE,
    PROBED_AT_ONCE,
    VALIDATED_ON_TEST,
    clock,
    describe,
    hardware_for,
    heat_maps,
    record_redundancy,
    subspaces_on,
)
from training.run import WEIGHTS, is_first_process
from training.stages import check_items


def train(config: Mapping[str, Any]) -> RunFolder:
    """Train and evaluate one experiment; a finished one is left as it is, a killed one goes on.

    Args:
        config: nested mapping with the groups data, model, adapter, regularizer, trainer (see `scripts/conf`).

    Returns:
        The run's folder, with metrics.json and adapter.safetensors. Of several processes the first one writes
        them, and the others return before.

    Raises:
        ValueError, FileNotFoundError: for a bad configuration, before anything is written.
    """
    experiment = Experiment.of(config)
    run = RunFolder.of(experiment.runs, *experiment.levels)
    run.check(config)
    if run.finished:
        run.drop_checkpoints()  # of a run that was killed just then
        if not run.asked_for_these_data(config):
            run.check_data(fingerprint(open_data(experiment)))
        return run

    check_devices()
    first_stage = experiment.recipe.stages[0].name
    if experiment.start_from:
        run.check_source(first_stage, experiment.start_from, config)
    with clock(run, "load data and encoder"):
        data, splits, model = assemble(experiment)
        check_items(len(splits["train"]), experiment.recipe.batch_size)
        validation, data_fingerprint = _validation(splits, experiment), fingerprint(data)
    run.check_data(data_fingerprint)
    if experiment.start_from and not run.has_trained(first_stage):
        RunFolder(experiment.start_from).check_data(data_fingerprint)
    run.begin(config)
    if experiment.start_from:
        run.adopt_stage(first_stage, experiment.start_from)
    as_prior_work = experiment.data_options.get("validation") == "test"
    hardware = hardware_for(run, experiment)
    describe(
        run,
        experiment,
        model,
        hardware,
        data={
            "fingerprint": data_fingerprint,
            "images": {name: len(split) for name, split in splits.items()},
        },
        preprocessing=data.preprocessing
        + ("" if data.augmentation == "none" else f"; in training {data.augmentation} instead"),
        metric="accuracy",
        selected_on=VALIDATED_ON_TEST if as_prior_work else "validation",
        frozen_elsewhere=model.frozen_parameters,
    )
    torch.set_num_threads(hardware.threads)
    precision = hardware.precision
    probed: list[dict[str, Tensor]] = []

    with clock(run, "train") as watch:
        run_stages(
            model,
            experiment.recipe,
            run,
            dataset=splits["train"],
            collate=default_collate,
            objective=cross_entropy,
            evaluator=None if validation is None else lambda trained: evaluate(model, validation, precision=precision),
            metric="accuracy",
            heads=model.heads,
            regularizer=experiment.regularizer,
            hardware=hardware,
            seed=experiment.seed,
            after_stage=lambda: probed.append(heat_maps(probe(model, splits))),
            after_epoch=watch.tick,
        )
    if not is_first_process():  # the rest is for one alone; none waits, so that it may take its time
        return run
    save(model, run.path / WEIGHTS)

    with clock(run, "evaluate"):
        ends = ("validation", "test") if validation else ("test",)
        metrics: dict[str, Any] = {name: evaluate(model, splits[name], precision=precision) for name in ends}
        metrics["chance"] = {name: chance_accuracy(len(data.classes)) for name in ends}
        metrics |= record_redundancy(run, probed)
        if as_prior_work:
            metrics["validation_is"] = "test"  # for who reads the numbers alone
        if after := after_earlier_stages(run, experiment, model, splits["test"], precision):
            metrics["after"] = after
    run.finish(metrics)
    return run


def after_earlier_stages(
    run: RunFolder, experiment: Experiment, model: Classifier, test: Split, precision: str
) -> dict[str, dict[str, dict[str, float]]]:
    """{stage: {"test": metrics}} of each stage but the last, for metrics.json; nothing is selected on them.

    The first stage, without the penalty, is the reference that the paper compares the second one with (section 4.2).
    The model is left with the weights of one of them.
    """
    after = {}
    for stage in experiment.recipe.stages[:-1]:
        load(model, run.path / "checkpoints" / stage.name / WEIGHTS)
        after[stage.name] = {"test": evaluate(model, test, precision=precision)}
    return after


def probe(model: Classifier, splits: Mapping[str, Split]) -> dict[str, Subspaces]:
    """The subspaces of every low-rank layer on validation images, without dropout; {} where there is none.

    Where nothing is held out for validation, on training images without augmentation.
    """
    device = next(model.parameters()).device
    split = splits["validation"] if len(splits["validation"]) else splits["train"]
    batches = split.batches(PROBED_AT_ONCE, first=PROBE)
    return subspaces_on(model, ({name: t.to(device) for name, t in batch.items()} for batch in batches))


def cross_entropy(outputs: Mapping[str, Tensor], epoch: float) -> dict[str, Tensor]:
    """What the model returns -> its loss by name; the epoch does not matter."""
    return {"cross_entropy": functional.cross_entropy(outputs["logits"].float(), outputs["labels"])}


def _validation(splits: Mapping[str, Split], experiment: Experiment) -> Split | None:
    """The validation split, or None where nothing is held out; ValueError if the recipe selects on it then."""
    if len(splits["validation"]):
        return splits["validation"]
    if experiment.recipe.selection == "validation":
        raise ValueError(
            f"trainer.selection=validation, but data={experiment.data} trains on all images and holds none out for "
            "validation; use trainer.selection=last, or a setting of the data that holds some out (data.train=train800)"
        )
    return None

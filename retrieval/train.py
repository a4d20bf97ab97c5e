"""Fine-tune a retrieval model and leave a run folder: data -> model with adapter -> stages -> metrics -> report."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from adapters import save
from eval import chance_level
from eval.report import write_report
from regularizers import Subspaces
from regularizers.layers import low_rank_layers
from retrieval.assemble import assemble, check_recipe, fingerprint, open_splits, restore
from retrieval.batch import Captions, Collate, TrainingPairs, collate_text
from retrieval.data import RetrievalDataset
from retrieval.evaluate import encode, evaluate
from retrieval.experiment import Experiment
from retrieval.model import RetrievalModel
from retrieval.showcase import save_showcase
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
    """Train, evaluate and report one experiment; a finished one is left as it is, a killed one goes on.

    Args:
        config: nested mapping with the groups data, model, loss, adapter, regularizer, trainer (see `scripts/conf`).

    Returns:
        The run's folder, with metrics.json, adapter.safetensors and report.html. Of several processes the first one
        writes them, and the others return before.

    Raises:
        ValueError, FileNotFoundError: for a bad configuration or data that is not prepared, before anything is written.
    """
    experiment = Experiment.of(config)
    run = RunFolder.of(experiment.runs, *experiment.levels)
    run.check(config)
    if run.finished:
        run.drop_checkpoints()  # of a run that was killed just then
        if not run.asked_for_these_data(config):
            run.check_data(fingerprint(open_splits(experiment)))
        if is_first_process():
            complete_report(run, experiment.root)
        return run

    check_devices()
    first_stage = experiment.recipe.stages[0].name
    if experiment.start_from:
        run.check_source(first_stage, experiment.start_from, config)
    with clock(run, "load data and encoders"):
        splits, model, captions = assemble(experiment)
        check_recipe(experiment, model, captions["train"])
        pairs = TrainingPairs(
            splits["train"],
            captions["train"],
            pairing=experiment.pairing,
            augmentation=experiment.augmentation,
            seed=experiment.seed,
        )
        check_items(len(pairs), experiment.recipe.batch_size)
        validation, data_fingerprint = _validation(splits, experiment), fingerprint(splits)
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
            "images": {name: len(data) for name, data in splits.items()},
            "captions": {name: len(data.captions) for name, data in splits.items()},
        },
        preprocessing=join_texts(data.preprocessing for data in splits.values()),
        metric="Rsum",
        selected_on=VALIDATED_ON_TEST if as_prior_work else "validation",
    )
    torch.set_num_threads(hardware.threads)
    test = splits["test"]
    probed: list[dict[str, Tensor]] = []
    held_out = "train" if validation is None else "validation"

    with clock(run, "train") as watch:
        run_stages(
            model,
            experiment.recipe,
            run,
            dataset=pairs,
            collate=Collate(model.collate_visual, model.text_length),
            objective=experiment.loss,
            evaluator=None
            if validation is None
            else lambda trained: evaluate(model, validation, captions["validation"]),
            metric="Rsum",
            heads=model.heads,
            regularizer=experiment.regularizer,
            hardware=hardware,
            seed=experiment.seed,
            after_stage=lambda: probed.append(heat_maps(probe(model, splits[held_out], captions[held_out]))),
            after_epoch=watch.tick,
        )
    if not is_first_process():  # the rest is for one alone; none waits, so that it may take its time
        return run
    save(model, run.path / WEIGHTS)

    with clock(run, "evaluate"):
        metrics: dict[str, Any] = {}
        if validation is not None:
            metrics["validation"] = evaluate(model, validation, captions["validation"])
        encoded = encode(model, test, captions["test"])
        metrics["test"] = encoded.metrics(test.image_of_caption)
        ends = (test,) if validation is None else (validation, test)
        metrics["chance"] = {data.split: chance_level(data.image_of_caption, len(data)) for data in ends}
        if as_prior_work:
            metrics["validation_is"] = "test"  # for who reads the numbers alone
        metrics |= record_redundancy(run, probed)
    run.finish(metrics)  # from here on the run is finished: nothing for people may lose its numbers
    save_showcase(run, test, encoded)
    write_report(run.path)
    return run


def complete_report(run: RunFolder, root: Path | None = None) -> None:
    """Write what people look at of a finished run, where a kill after its numbers has lost that.

    Args:
        run: a finished run.
        root: where the data are now, if not where the run had them.

    Where the pictures cannot be had any more, that is printed, and the report goes without.
    """
    if (run.path / "retrieved.json").is_file() and (run.path / "report.html").is_file():
        return
    if not (run.path / "retrieved.json").is_file():
        try:
            described, (splits, model, captions) = run.read_json("run.json"), restore(run.path, root)
            torch.set_num_threads(described["threads"])
            encoded = encode(model, splits["test"], captions["test"])
            save_showcase(run, splits["test"], encoded)
        except Exception as error:  # the data may be gone, or the disk full: that must not cost the numbers' report
            tqdm.write(f"the report of {run.path} goes without pictures: {type(error).__name__}: {error}")
    write_report(run.path)


def join_texts(texts: Iterable[str]) -> str:
    """The texts of several splits as one, in which what they have in common, between semicolons, is there once."""
    return "; ".join(dict.fromkeys(part for text in texts for part in text.split("; ")))


def probe(model: RetrievalModel, data: RetrievalDataset, captions: Captions) -> dict[str, Subspaces]:
    """The subspaces of every low-rank layer on the first pairs of a split, without dropout; {} where there is none."""
    if not low_rank_layers(model):
        return {}  # before any video is decoded
    device = next(model.parameters()).device
    images = range(min(PROBE, len(data)))

    def batches() -> Iterator[dict[str, Tensor]]:
        for start in range(0, len(images), PROBED_AT_ONCE):
            some = images[start : start + PROBED_AT_ONCE]
            first_caption = [int((data.image_of_caption == image).argmax()) for image in some]
            batch = model.collate_visual([data.visual(image) for image in some])
            batch |= collate_text([captions.ids[caption] for caption in first_caption], model.text_length)
            yield {name: tensor.to(device) for name, tensor in batch.items()}

    return subspaces_on(model, batches())


def _validation(splits: Mapping[str, RetrievalDataset], experiment: Experiment) -> RetrievalDataset | None:
    """The validation split, or None where nothing is held out; ValueError if the recipe selects on it then."""
    if len(splits["validation"]):
        return splits["validation"]
    if experiment.recipe.selection == "validation":
        raise ValueError(
            f"trainer.selection=validation, but data={experiment.data} holds nothing out for validation "
            "(data.validation=0); use trainer.selection=last, or hold some out (data.validation=500)"
        )
    return None

"""Fine-tune a retrieval model and leave a run folder: data -> model with adapter -> stages -> metrics -> report."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import torch
from torch import nn

from adapters import adapter_parameters, save, trainable_parameters
from eval import chance_level, retrieval_metrics
from eval.report import write_report
from regularizers import Subspaces, capture, mean_redundancy, redundancy
from retrieval.assemble import assemble
from retrieval.batch import Captions, TrainingPairs, collate_text, collator
from retrieval.data import RetrievalDataset
from retrieval.evaluate import encode, evaluate
from retrieval.experiment import Experiment
from retrieval.model import RetrievalModel
from retrieval.showcase import save_showcase
from training import Hardware, RunFolder, Stage, choose_hardware, run_stages
from training.run import environment

PROBE = 128  # validation pairs on which redundancy is measured


def train(config: Mapping[str, Any]) -> RunFolder:
    """Train, evaluate and report one experiment; a finished one is left as it is, a killed one goes on.

    Args:
        config: nested mapping with the groups data, model, loss, adapter, regularizer, trainer (see `scripts/conf`).

    Returns:
        The run's folder, with metrics.json, adapter.safetensors and report.html.

    Raises:
        ValueError, FileNotFoundError: for a bad configuration or data that is not prepared, before training starts.
    """
    experiment = Experiment.of(config)
    run = RunFolder.of(experiment.runs, *experiment.levels)
    run.check(config)
    if run.finished:
        if not (run.path / "report.html").is_file():
            write_report(run.path)
        return run

    with _clock(run, "load data and encoders"):
        splits, model, captions = assemble(experiment)
    run.begin(config)
    hardware = _describe(run, experiment, model, splits)
    torch.set_num_threads(hardware.threads)
    validation, test, precision = splits["validation"], splits["test"], hardware.precision
    probed: list[dict[str, Subspaces]] = []

    def after_stage(stage: Stage, trained: nn.Module) -> None:
        if adapter_parameters(trained):
            probed.append(probe(model, validation, captions["validation"]))

    with _clock(run, "train"):
        run_stages(
            model,
            experiment.recipe,
            run,
            dataset=TrainingPairs(
                splits["train"],
                captions["train"],
                pairing=experiment.pairing,
                augmentation=experiment.augmentation,
                seed=experiment.seed,
            ),
            collate=collator(model.collate_visual),
            objective=experiment.loss,
            evaluator=lambda trained: evaluate(model, validation, captions["validation"], precision=precision),
            heads=model.heads,
            regularizer=experiment.regularizer,
            hardware=hardware,
            seed=experiment.seed,
            after_stage=after_stage,
        )
    save(model, run.path / "adapter.safetensors")

    with _clock(run, "evaluate"):
        metrics: dict[str, Any] = {
            "validation": evaluate(model, validation, captions["validation"], precision=precision)
        }
        images, texts = encode(model, test, captions["test"], precision=precision)
        metrics["test"] = retrieval_metrics(images, texts, test.image_of_caption)
        metrics["chance"] = {data.split: chance_level(data.image_of_caption, len(data)) for data in (validation, test)}
        save_showcase(run, test, images, texts)
        if probed:
            ends = {"before": probed[0], "after": probed[-1]}
            metrics["redundancy"] = {when: mean_redundancy(layers) for when, layers in ends.items()}
            heat = {when: {n: redundancy(s).tolist() for n, s in layers.items()} for when, layers in ends.items()}
            run.write_json("redundancy.json", heat)
    run.write_json("metrics.json", metrics)
    write_report(run.path)
    return run


@torch.no_grad()
def probe(model: RetrievalModel, data: RetrievalDataset, captions: Captions) -> dict[str, Subspaces]:
    """The subspaces of every adapted layer on the first pairs of a split, without dropout."""
    was_training = model.training
    model.eval()
    images = range(min(PROBE, len(data)))
    first_caption = [int((data.image_of_caption == image).argmax()) for image in images]
    batch = model.collate_visual([data.visual(image) for image in images])
    batch |= collate_text([captions.ids[caption] for caption in first_caption])
    with capture(model) as subspaces:
        model(**batch)
    model.train(was_training)
    return subspaces


def _describe(
    run: RunFolder, experiment: Experiment, model: RetrievalModel, splits: Mapping[str, RetrievalDataset]
) -> Hardware:
    """Write run.json, unless an earlier launch of the same run did; return the hardware choice that it holds."""
    described = run.read_json("run.json") or {}
    if "threads" not in described:
        hardware = choose_hardware(experiment.threads, experiment.precision)
        described |= environment() | {
            "seed": experiment.seed,
            "threads": hardware.threads,
            "precision": hardware.precision,
            "model": experiment.model["name"],
            "adapter": str(experiment.adapter),
            "regularizer": str(experiment.regularizer or "none"),
            "selection": {
                "last": "the last epoch of each stage",
                "validation": "the epoch of each stage with the best Rsum on validation",
            }[experiment.recipe.selection],
            "preprocessing": splits["train"].preprocessing,
            "data": {
                "name": experiment.data,
                "fingerprint": hashlib.sha256(
                    "".join(data.fingerprint for data in splits.values()).encode()
                ).hexdigest(),
                "images": {name: len(data) for name, data in splits.items()},
                "captions": {name: len(data.captions) for name, data in splits.items()},
            },
            "trained_parameters": trainable_parameters(model),
            "adapter_parameters": sum(
                parameter.numel() for name, parameter in model.named_parameters() if name in adapter_parameters(model)
            ),
            "total_parameters": sum(parameter.numel() for parameter in model.parameters()),
        }
        run.write_json("run.json", described)
    return Hardware(described["threads"], described["precision"])


@contextmanager
def _clock(run: RunFolder, part: str) -> Iterator[None]:
    """Add the seconds that a part takes to run.json; a resumed run adds to what its earlier launches spent."""
    start = perf_counter()
    yield
    described = run.read_json("run.json") or {}
    seconds = described.setdefault("seconds", {})
    seconds[part] = round(seconds.get(part, 0.0) + perf_counter() - start, 2)
    run.write_json("run.json", described)

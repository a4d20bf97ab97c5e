"""Fine-tune a retrieval model and leave a run folder: data -> model with adapter -> stages -> metrics -> report."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from eval import chance_level
from eval.report import write_report
from regularizers import Subspaces
from regularizers.layers import low_rank_layers
from retrieval.assemble import assemble, check_recipe, fingerprint, open_splits, restore
from retrieval.batch import Captions, Collate, TrainingPairs, collate_text
from retrieval.data import RetrievalDataset
from retrieval.evaluate import Encoded, encode
from retrieval.experiment import Experiment
from retrieval.model import RetrievalModel
from retrieval.showcase import save_showcase
from training import RunFolder
from training.record import PROBE, PROBED_AT_ONCE, subspaces_on
from training.run import is_first_process
from training.task import Task, run_task


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
    run, trained = run_task(config, experiment, Retrieval)
    if is_first_process():
        complete_report(run, experiment.root, trained)
    return run


class Retrieval(Task[Experiment]):
    """Matching pairs, the model that brings them together, and Recall@K.

    Attributes:
        splits, captions: the data of each split, and its sentences as tokens.
        tested: the test split as the trained model sees it, for the report; None before it is evaluated.
    """

    to_hold_out = "data.validation=500"
    model: RetrievalModel

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.splits, self.model, self.captions = assemble(experiment)
        self.tested: Encoded | None = None
        check_recipe(experiment, self.model, self.captions["train"])
        self.heads = self.model.heads
        self.items = TrainingPairs(
            self.splits["train"],
            self.captions["train"],
            pairing=experiment.pairing,
            augmentation=experiment.augmentation,
            seed=experiment.seed,
        )
        self.collate = Collate(self.model.collate_visual, self.model.text_length)
        self.objective = experiment.loss
        self.sizes = {
            "images": {name: len(data) for name, data in self.splits.items()},
            "captions": {name: len(data.captions) for name, data in self.splits.items()},
        }
        self.fingerprint = fingerprint(self.splits)
        self.preprocessing = join_texts(data.preprocessing for data in self.splits.values())

    @classmethod
    def fingerprint_of(cls, experiment: Experiment) -> str:
        return fingerprint(open_splits(experiment))

    def evaluate(self, split: str, precision: str) -> dict[str, float]:
        """In float32, whatever the precision (see `encode`)."""
        encoded = encode(self.model, self.splits[split], self.captions[split])
        if split == "test":
            self.tested = encoded
        return encoded.metrics(self.splits[split].image_of_caption)

    def chance(self, split: str) -> dict[str, float]:
        return chance_level(self.splits[split].image_of_caption, len(self.splits[split]))

    def probe(self) -> dict[str, Subspaces]:
        held_out = "validation" if self.validates else "train"
        return probe(self.model, self.splits[held_out], self.captions[held_out])


def complete_report(run: RunFolder, root: Path | None = None, trained: Retrieval | None = None) -> None:
    """Write what people look at of a finished run, unless it is there.

    Args:
        run: a finished run.
        root: where the data are now, if not where the run had them.
        trained: the task that has just trained. None for a run that had finished before: if it was killed before its
            report was written, the model is rebuilt from the run's folder.

    Where the pictures cannot be had any more, that is printed, and the report goes without.
    """
    if trained and trained.tested:
        save_showcase(run, trained.splits["test"], trained.tested)
    elif not (run.path / "retrieved.json").is_file():
        try:
            described, (splits, model, captions) = run.read_json("run.json"), restore(run.path, root)
            torch.set_num_threads(described["threads"])
            encoded = encode(model, splits["test"], captions["test"])
            save_showcase(run, splits["test"], encoded)
        except Exception as error:  # the data may be gone, or the disk full: that must not cost the numbers' report
            tqdm.write(f"the report of {run.path} goes without pictures: {type(error).__name__}: {error}")
    elif (run.path / "report.html").is_file():
        return
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

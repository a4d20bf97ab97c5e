"""Fine-tune a classification model and leave a run folder: data -> model with adapter -> stages -> metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional
from torch.utils.data import default_collate

from adapters import load
from classification.assemble import assemble, fingerprint, open_data
from classification.evaluate import Split, evaluate
from classification.experiment import Experiment
from classification.models import Classifier
from eval import chance_accuracy
from regularizers import Subspaces
from training import RunFolder
from training.record import PROBE, PROBED_AT_ONCE, subspaces_on
from training.run import WEIGHTS
from training.task import Task, run_task


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
    run, _ = run_task(config, Experiment.of(config), Classification)
    return run


class Classification(Task[Experiment]):
    """Labelled images, a backbone with a linear head, and accuracy.

    Attributes:
        splits: as the model takes them.
        classes: how many there are.
    """

    to_hold_out = "data.train=train800"
    model: Classifier

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        data, self.splits, self.model = assemble(experiment)
        self.classes = len(data.classes)
        self.heads = self.model.heads
        self.items, self.collate, self.objective = self.splits["train"], default_collate, cross_entropy
        self.sizes = {"images": {name: len(split) for name, split in self.splits.items()}}
        self.fingerprint = fingerprint(data)
        in_training = "" if data.augmentation == "none" else f"; in training {data.augmentation} instead"
        self.preprocessing = data.preprocessing + in_training
        self.frozen_elsewhere = self.model.frozen_parameters

    @classmethod
    def fingerprint_of(cls, experiment: Experiment) -> str:
        return fingerprint(open_data(experiment))

    def evaluate(self, split: str, precision: str) -> dict[str, float]:
        return evaluate(self.model, self.splits[split], precision=precision)

    def chance(self, split: str) -> dict[str, float]:
        return chance_accuracy(self.classes)

    def probe(self) -> dict[str, Subspaces]:
        return probe(self.model, self.splits)

    def further_metrics(self, run: RunFolder, precision: str) -> dict[str, Any]:
        """{"after": {stage: {"test": metrics}}} of each stage but the last; nothing is selected on them.

        The first stage, without the penalty, is the reference that the paper compares the second one with (section
        4.2). The model is left with the weights of one of them.
        """
        after = {}
        for stage in self.experiment.recipe.stages[:-1]:
            load(self.model, run.path / "checkpoints" / stage.name / WEIGHTS)
            after[stage.name] = {"test": self.evaluate("test", precision)}
        return {"after": after} if after else {}


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

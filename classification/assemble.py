"""Put together what an experiment names: the data, the splits as the model takes them, the model with its adapter."""

from __future__ import annotations

import hashlib
from pathlib import Path

from transformers import set_seed

from adapters import inject, load
from classification.data import DATASETS, SPLITS, ClassificationDataset
from classification.evaluate import Split
from classification.experiment import Experiment
from classification.images import LabelledImages
from classification.models import Classifier, build_model
from classification.tokens import LabelledTokens, cached_tokens
from training import RunFolder, choose
from training.hardware import compute_device
from training.run import WEIGHTS


def assemble(experiment: Experiment) -> tuple[ClassificationDataset, dict[str, Split], Classifier]:
    """The data set, each split as the model takes it, and the model with a fresh adapter.

    A model that is cut gets the tokens of its frozen blocks, computed once; a whole one gets images, and those of the
    training split augmented if the data set does that.

    Raises:
        ValueError: for settings that the data set or the model does not take.
    """
    data = open_data(experiment)
    set_seed(experiment.seed)  # the first values of the head and of the adapter
    side = data.images([0]).shape[-1]
    frozen, model = build_model(experiment.model, cache=experiment.cache, image_size=side, classes=len(data.classes))
    inject(model, experiment.adapter, train=model.heads)
    if frozen is None:
        return data, {split: _images(data, split, experiment) for split in SPLITS}, model
    if data.augmentation != "none":
        raise ValueError(
            f"model={experiment.model['name']} computes the tokens of an image once, and data.augmentation="
            f"{data.augmentation!r} wants it anew in each epoch: use data.augmentation=none, or a whole model (vit_b16)"
        )
    tokens = cached_tokens(data, frozen, experiment.root)
    return data, {split: LabelledTokens(tokens, data.labels, data.splits[split]) for split in SPLITS}, model


def open_data(experiment: Experiment) -> ClassificationDataset:
    """The data set; raises FileNotFoundError if it is not there, ValueError for settings that it does not take."""
    data: ClassificationDataset = choose("data", DATASETS, {"name": experiment.data, **experiment.data_options})
    return data


def _images(data: ClassificationDataset, split: str, experiment: Experiment) -> LabelledImages:
    return LabelledImages(
        data,
        data.splits[split],
        augmented=split == "train" and data.augmentation != "none",
        seed=experiment.seed,
        workers=experiment.recipe.workers,
    )


def restore(
    run: str | Path, root: str | Path | None = None
) -> tuple[ClassificationDataset, dict[str, Split], Classifier]:
    """What `assemble` gave to a run that has finished, with the trained weights from its adapter file.

    Args:
        run: its folder.
        root: where the data are now, if not where the run had them.

    Raises:
        FileNotFoundError: if `run` is no folder of a finished run.
        Unrestorable: if another version wrote its configuration, or the data are not those that it was trained on.
    """
    run = Path(run)
    data, splits, model = assemble(Experiment.of(RunFolder(run).finished_config(root)))
    RunFolder(run).check_data(fingerprint(data))
    load(model, run / WEIGHTS).to(compute_device())
    return data, splits, model


def fingerprint(data: ClassificationDataset) -> str:
    """SHA-256 over the data and which image is in which split."""
    digest = hashlib.sha256(data.fingerprint.encode())
    for split in SPLITS:
        digest.update(f"{split} {data.splits[split].tolist()}".encode())
    return digest.hexdigest()

"""Put together what an experiment names: the data, the splits as tokens, the model with its adapter."""

from __future__ import annotations

from transformers import set_seed

from adapters import inject
from classification.data import DATASETS, SPLITS, ClassificationDataset
from classification.experiment import Experiment
from classification.models import TokenClassifier, build_model
from classification.tokens import LabelledTokens, cached_tokens
from training import choose


def assemble(experiment: Experiment) -> tuple[ClassificationDataset, dict[str, LabelledTokens], TokenClassifier]:
    """The data set, each split as tokens of the frozen blocks, and the blocks after them with a fresh adapter.

    Raises:
        ValueError: for settings that the data set or the model does not take.
    """
    data = choose("data", DATASETS, {"name": experiment.data, **experiment.data_options})
    set_seed(experiment.seed)  # the first values of the head and of the adapter
    side = data.images([0]).shape[-1]
    frozen, model = build_model(experiment.model, cache=experiment.cache, image_size=side, classes=len(data.classes))
    inject(model, experiment.adapter, train=model.heads)
    tokens = cached_tokens(data, frozen, experiment.root)
    return data, {split: LabelledTokens(tokens, data.labels, data.splits[split]) for split in SPLITS}, model

"""Put together what an experiment names: the splits, the model with its adapter, the tokenized captions."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import set_seed

from adapters import inject, load
from retrieval.batch import Captions
from retrieval.data import DATASETS, SPLITS, RetrievalDataset
from retrieval.experiment import Experiment
from retrieval.model import RetrievalModel
from retrieval.models import build_model
from training import RunFolder
from training.chunked import check_chunkable
from training.hardware import compute_device
from training.run import WEIGHTS


def assemble(experiment: Experiment) -> tuple[dict[str, RetrievalDataset], RetrievalModel, dict[str, Captions]]:
    """The splits, the model with a fresh adapter in it, and the captions of each split as tokens.

    Raises:
        FileNotFoundError: if the data are not prepared; the message says how to.
        ValueError: if data and model do not go together.
    """
    splits = open_splits(experiment)
    set_seed(experiment.seed)  # the first values of the heads and of the adapter
    model, tokenizer = build_model(experiment.model, splits["train"], experiment.cache)
    inject(model, experiment.adapter, train=model.heads)
    with torch.no_grad():
        token = torch.ones(1, 1, dtype=torch.long)
        model.encode_text(token, token)  # an adapter may change the width; if the head does not follow, it fails here
    captions = {name: Captions(data.captions, tokenizer, experiment.max_length) for name, data in splits.items()}
    return splits, model, captions


def open_splits(experiment: Experiment) -> dict[str, RetrievalDataset]:
    """The data; raises FileNotFoundError if they are not prepared, with a message that says how to."""
    dataset = DATASETS[experiment.data]
    return {split: dataset(experiment.root, split, **experiment.data_options) for split in SPLITS}


def check_recipe(experiment: Experiment, model: RetrievalModel, captions: Captions) -> None:
    """Raise ValueError for a recipe that this model cannot be trained with."""
    if model.pair_scores is not None and experiment.recipe.chunk_size is not None:
        raise ValueError(
            "trainer.chunk_size needs a loss of separate embeddings, but model.head=tightTransf compares sentence and "
            "clip inside the model; use trainer.chunk_size=null or another head"
        )
    if experiment.recipe.chunk_size is not None:
        check_chunkable(model)
    if experiment.augmentation and experiment.augmentation.change_words and captions.mask_id is None:
        raise ValueError("CLIP's tokenizer has no mask token to augment words with; use trainer.augmentation=null")


def restore(
    run: str | Path, root: str | Path | None = None
) -> tuple[dict[str, RetrievalDataset], RetrievalModel, dict[str, Captions]]:
    """What `assemble` gave to a run that has finished, with the trained weights from its adapter file.

    Args:
        run: its folder.
        root: where the data are now, if not where the run had them.

    Raises:
        FileNotFoundError: if `run` is no folder of a finished run.
        Unrestorable: if another version wrote its configuration, or the data are not those that it was trained on.
    """
    run = Path(run)
    splits, model, captions = assemble(Experiment.of(RunFolder(run).finished_config(root)))
    RunFolder(run).check_data(fingerprint(splits))
    load(model, run / WEIGHTS).to(compute_device())
    return splits, model, captions


def fingerprint(splits: Mapping[str, RetrievalDataset]) -> str:
    """SHA-256 over the data of all splits."""
    return hashlib.sha256("".join(data.fingerprint for data in splits.values()).encode()).hexdigest()

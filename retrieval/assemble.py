"""Put together what an experiment names: the splits, the model with its adapter, the tokenized captions."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml
from transformers import set_seed

from adapters import inject, load
from retrieval.batch import Captions
from retrieval.data import DATASETS, SPLITS, RetrievalDataset
from retrieval.experiment import Experiment
from retrieval.model import RetrievalModel
from retrieval.models import build_model
from training.chunked import check_chunkable
from training.hardware import compute_device


def assemble(experiment: Experiment) -> tuple[dict[str, RetrievalDataset], RetrievalModel, dict[str, Captions]]:
    """The splits, the model with a fresh adapter in it, and the captions of each split as tokens.

    Raises:
        FileNotFoundError: if the data are not prepared; the message says how to.
        ValueError: if data and model do not go together.
    """
    dataset = DATASETS[experiment.data]
    splits = {split: dataset(experiment.root, split, **experiment.data_options) for split in SPLITS}
    set_seed(experiment.seed)  # the first values of the heads and of the adapter
    model, tokenizer = build_model(experiment.model, splits["train"], experiment.cache)
    inject(model, experiment.adapter, train=model.heads)
    with torch.no_grad():
        token = torch.ones(1, 1, dtype=torch.long)
        model.encode_text(token, token)  # an adapter may change the width; if the head does not follow, it fails here
    captions = {name: Captions(data.captions, tokenizer, experiment.max_length) for name, data in splits.items()}
    return splits, model, captions


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


def restore(run: Path) -> tuple[dict[str, RetrievalDataset], RetrievalModel, dict[str, Captions]]:
    """What `assemble` gave to a run that has finished, with the trained weights from its adapter file.

    Raises:
        FileNotFoundError: if `run` is no folder of a finished run.
    """
    for name in ("config.yaml", "adapter.safetensors"):
        if not (run / name).is_file():
            raise FileNotFoundError(f"{run} holds no {name}: expected the folder of a run that training has finished")
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    splits, model, captions = assemble(Experiment.of(config))
    load(model, run / "adapter.safetensors").to(compute_device())
    return splits, model, captions

"""What a run writes about itself: run.json (what ran, how long) and redundancy.json (before and after)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from adapters import adapter_parameters, trainable_parameters
from regularizers import Subspaces, capture, mean_redundancy, redundancy
from regularizers.layers import low_rank_layers
from training.experiment import BaseExperiment
from training.hardware import Hardware, choose_hardware
from training.run import RunFolder, environment, is_first_process

PROBE = 128  # validation items on which redundancy is measured


def describe(
    run: RunFolder,
    experiment: BaseExperiment,
    model: nn.Module,
    *,
    data: Mapping[str, Any],
    preprocessing: str,
    metric: str,
    frozen_elsewhere: int = 0,
) -> Hardware:
    """Write run.json, unless an earlier launch of the same run did; return the hardware choice that it holds.

    Args:
        run: its folder.
        experiment: what was asked for.
        model: with its adapter in it.
        data: the fingerprint of the data and the sizes of the splits.
        preprocessing: how files became what the model takes.
        metric: what "validation" selection maximises, for people.
        frozen_elsewhere: parameters of the backbone that `model` does not hold because their outputs are cached.
    """
    described = run.read_json("run.json") or {}
    if "threads" not in described:
        hardware = choose_hardware(experiment.threads, experiment.precision)
        of_adapter = adapter_parameters(model)
        described |= environment() | {
            "seed": experiment.seed,
            "threads": hardware.threads,
            "precision": hardware.precision,
            "model": experiment.model["name"],
            "adapter": str(experiment.adapter),
            "regularizer": str(experiment.regularizer or "none"),
            "selection": {
                "last": "the last epoch of each stage",
                "validation": f"the epoch of each stage with the best {metric} on validation",
            }[experiment.recipe.selection],
            "preprocessing": preprocessing,
            "data": {"name": experiment.data, **data},
            "trained_parameters": trainable_parameters(model),
            "adapter_parameters": sum(p.numel() for name, p in model.named_parameters() if name in of_adapter),
            "total_parameters": sum(p.numel() for p in model.parameters()) + frozen_elsewhere,
        }
        if is_first_process():
            run.write_json("run.json", described)
    return Hardware(described["threads"], described["precision"])


@contextmanager
def clock(run: RunFolder, part: str) -> Iterator[None]:
    """Add the seconds that a part takes to run.json; a resumed run adds to what its earlier launches spent.

    Of several processes, the first one's: they run at the same time.
    """
    start = perf_counter()
    yield
    if not is_first_process():
        return
    described = run.read_json("run.json") or {}
    seconds = described.setdefault("seconds", {})
    seconds[part] = round(seconds.get(part, 0.0) + perf_counter() - start, 2)
    run.write_json("run.json", described)


@torch.no_grad()
def subspaces_on(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Subspaces]:
    """The subspaces of every low-rank layer on one batch (the arguments of the model's forward), without dropout.

    {} for a model without such a layer: many adapters have none.
    """
    if not low_rank_layers(model):
        return {}
    was_training = model.training
    model.eval()
    with capture(model) as subspaces:
        model(**batch)
    model.train(was_training)
    return subspaces


def record_redundancy(run: RunFolder, probed: Sequence[Mapping[str, Subspaces]]) -> dict[str, Any]:
    """Write redundancy.json from what was probed after each stage: the first is "before", the last is "after".

    Returns:
        {"redundancy": {"before": mean, "after": mean}} for metrics.json; {} where no layer has two subspaces.
    """
    several = [{name: layer for name, layer in layers.items() if len(layer.basis) > 1} for layers in probed]
    if not several or not several[0]:
        return {}
    ends = {"before": several[0], "after": several[-1]}
    heat = {when: {n: redundancy(s).tolist() for n, s in layers.items()} for when, layers in ends.items()}
    run.write_json("redundancy.json", heat)
    return {"redundancy": {when: mean_redundancy(layers) for when, layers in ends.items()}}

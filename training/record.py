"""What a run writes about itself: run.json (what ran, how long) and redundancy.json (before and after)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from adapters import adapter_parameter_names, trainable_parameters
from regularizers import Subspaces, capture, redundancy
from regularizers.diagnostics import mean_off_diagonal
from regularizers.layers import low_rank_layers
from training.experiment import BaseExperiment
from training.hardware import Hardware, choose_hardware, device_name, process_count
from training.log import metric_name
from training.run import RunFolder, environment, is_first_process

PROBE = 128  # validation items on which redundancy is measured
PROBED_AT_ONCE = 32


def hardware_for(run: RunFolder, experiment: BaseExperiment) -> Hardware:
    """What an earlier launch of the run computed with, or else what is asked for, or is the fastest here (measured).

    Raises:
        ValueError: an earlier launch had another number of processes, and with it another batch.
    """
    described = run.read_json("run.json") or {}
    if (before := described.get("processes", process_count())) != process_count():
        raise ValueError(
            f"{run.path} was begun with {before} processes and would go on with {process_count()}, that is, with other "
            f"batches; launch it with `torchrun --nproc_per_node {before}` (python for 1), or in another runs=FOLDER"
        )
    if "threads" in described:
        return Hardware(described["threads"], described["precision"])
    return choose_hardware(experiment.threads, experiment.precision)


def describe(
    run: RunFolder,
    experiment: BaseExperiment,
    model: nn.Module,
    hardware: Hardware,
    *,
    data: Mapping[str, Any],
    preprocessing: str,
    metric: str,
    selected_on: str,
    frozen_elsewhere: int,
) -> None:
    """Write run.json, unless an earlier launch of the same run did.

    Args:
        run: its folder.
        experiment: what was asked for.
        model: with its adapter in it.
        hardware: as of `hardware_for`.
        data: the fingerprint of the data and the sizes of the splits.
        preprocessing: how files became what the model takes.
        metric: what "validation" selection maximises, its key.
        selected_on: what it is evaluated on, for people: the validation split, unless that is not one of its own.
        frozen_elsewhere: parameters of the backbone that `model` does not hold because their outputs are cached.
    """
    described = run.read_json("run.json") or {}
    if "threads" in described or not is_first_process():
        return
    of_adapter = adapter_parameter_names(model)
    described |= environment() | {
        "seed": experiment.seed,
        "device": device_name(),
        "processes": process_count(),
        "batch_size": experiment.recipe.batch_size * process_count(),
        "threads": hardware.threads,
        "precision": hardware.precision,
        "model": experiment.model["name"],
        "adapter": str(experiment.adapter),
        "regularizer": str(experiment.regularizer or "none"),
        "selection": {
            "last": "the last epoch of each stage",
            "validation": f"the epoch of each stage with the best {metric_name(metric)} on {selected_on}",
        }[experiment.recipe.selection],
        "preprocessing": preprocessing,
        "data": {"name": experiment.data, **data},
        "trained_parameters": trainable_parameters(model),
        "adapter_parameters": sum(p.numel() for name, p in model.named_parameters() if name in of_adapter),
        "total_parameters": sum(p.numel() for p in model.parameters()) + frozen_elsewhere,
    }
    run.write_json("run.json", described)


class Clock:
    """Adds seconds to a part of run.json."""

    def __init__(self, run: RunFolder, part: str) -> None:
        self.run, self.part, self.since = run, part, perf_counter()

    def tick(self) -> None:
        """Write down the time since the last tick."""
        now = perf_counter()
        if is_first_process():
            described = self.run.read_json("run.json") or {}
            seconds = described.setdefault("seconds", {})
            seconds[self.part] = round(seconds.get(self.part, 0.0) + now - self.since, 2)
            self.run.write_json("run.json", described)
        self.since = now


@contextmanager
def clock(run: RunFolder, part: str) -> Iterator[Clock]:
    """Add the seconds that a part takes to run.json; a resumed run adds to what its earlier launches spent.

    What is killed loses the time since its last tick. Of several processes, the first one's time: they run at once.
    """
    watch = Clock(run, part)
    try:
        yield watch
    finally:
        watch.tick()


@torch.no_grad()
def subspaces_on(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> dict[str, Subspaces]:
    """The subspaces of every low-rank layer on some batches (arguments of the model's forward), without dropout.

    {} for a model without such a layer: many adapters have none.
    """
    if not low_rank_layers(model):
        return {}
    was_training = model.training
    model.eval()
    with capture(model) as subspaces:
        for batch in batches:
            model(**batch)
    model.train(was_training)
    return subspaces


def heat_maps(layers: Mapping[str, Subspaces]) -> dict[str, Tensor]:
    """The redundancy (r, r) of each layer that has two subspaces or more: all that a run keeps of what it probed."""
    return {name: redundancy(layer).cpu() for name, layer in layers.items() if len(layer.basis) > 1}


def record_redundancy(run: RunFolder, probed: Sequence[Mapping[str, Tensor]]) -> dict[str, Any]:
    """Write redundancy.json from the heat maps after each stage: the first is "before", the last is "after".

    Returns:
        {"redundancy": {"before": mean, "after": mean}} for metrics.json; {} where no layer has two subspaces.
    """
    if not probed or not probed[0]:
        return {}
    ends = {"before": probed[0], "after": probed[-1]}
    run.write_json("redundancy.json", {when: {n: h.tolist() for n, h in heat.items()} for when, heat in ends.items()})
    means = {when: [mean_off_diagonal(layer) for layer in heat.values()] for when, heat in ends.items()}
    return {"redundancy": {when: sum(each) / len(each) for when, each in means.items()}}

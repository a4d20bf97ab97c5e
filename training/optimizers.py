"""Optimiser groups: the adapter, the heads, and (in full fine-tuning) the backbone, each with its own learning rate.

A parameter falls into a group by what it is, not by a part of its name: in prior code an adapter inside "clip." fell
into the backbone's group and trained at a thousandth of its rate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from adapters import adapter_parameter_names
from adapters.inject import parameters_below
from training.bert_adam import BertAdam

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"adamw": torch.optim.AdamW, "bert_adam": BertAdam}


@dataclass(frozen=True, kw_only=True)
class LearningRates:
    """Peak learning rates by group, and the decoupled weight decay of AdamW.

    Vectors (biases, norms) do not decay, unless `decay_vectors` is set.
    """

    adapter: float = 2e-3
    head: float = 1e-3
    backbone: float = 5e-5
    weight_decay: float = 1e-4
    decay_vectors: bool = False

    def __post_init__(self) -> None:
        for name in ("adapter", "head", "backbone", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"rates.{name} is {getattr(self, name)}; expected a number, 0 or more")


def parameter_groups(model: nn.Module, rates: LearningRates, heads: tuple[str, ...]) -> list[dict]:
    """Sort the parameters that train into AdamW's groups; `heads` are paths of what is neither backbone nor adapter.

    Raises:
        ValueError: if nothing trains.
    """
    adapter, of_heads = adapter_parameter_names(model), parameters_below(model, heads)
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = "adapter" if name in adapter else "head" if parameter in of_heads else "backbone"
            groups.setdefault((kind, parameter.dim() > 1 or rates.decay_vectors), []).append(parameter)
    if not groups:
        raise ValueError(f"nothing trains in {type(model).__name__}: inject an adapter, or name what trains besides it")
    return [
        {
            "name": kind,
            "params": parameters,
            "lr": getattr(rates, kind),
            "weight_decay": rates.weight_decay if decay else 0.0,
        }
        for (kind, decay), parameters in groups.items()
    ]


def build_optimizer(name: str, model: nn.Module, rates: LearningRates, heads: tuple[str, ...]) -> torch.optim.Optimizer:
    """The optimiser called `name`, one of `OPTIMIZERS`, over `parameter_groups`."""
    return OPTIMIZERS[name](parameter_groups(model, rates, heads))

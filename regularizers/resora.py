"""ReSoRA: a weighted redundancy penalty over every captured layer (section 3.3 of the paper)."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from regularizers.capture import capture, layer_pattern
from regularizers.cosine import cosine
from regularizers.euclidean import euclidean
from regularizers.linear import linear
from regularizers.nonlinear import nonlinear
from regularizers.overlap import overlap
from regularizers.subspaces import Captured, Subspaces, with_pairs

# A measure takes activations (..., N, r) and basis (..., r, d_out) of layers (...) and returns (...): one file and one
# line here.
REGULARIZERS: dict[str, Callable[..., Tensor]] = {
    "euclidean": euclidean,
    "cosine": cosine,
    "linear": linear,
    "nonlinear": nonlinear,
    "overlap": overlap,
}
REDUCTIONS = ("mean", "sum")


class ReSoRA:
    """The penalty to add to a task's loss: weight x the mean of a measure over the adapted layers.

        resora = ReSoRA("linear", weight=1e-2)
        with resora.capture(model) as subspaces:
            loss = model(**batch).loss
        loss = loss + sum(resora(subspaces).values())

    Where a measure's gradient goes, to A or to B, is in its docstring and in docs/regularizers.md.

    Args:
        measure: a name in `REGULARIZERS`.
        weight: the penalty's weight. Default: 1e-2, the middle of those in docs/results.md; the paper gives none.
            It multiplies a sum over pairs: at rank 64 the same weight is 72 times as strong as at rank 8.
        on: "features", or "weights" as in the paper's Table 4, see `capture`.
        samples: "tokens" or "mean", see `capture`.
        layers: a regular expression of the layers to penalise, see `capture`. Default: all.
        reduction: "mean" or "sum" over the layers. The paper applies the measure to each LoRA component on its own and
            does not say; with the mean, the weight means the same for two layers and for thirty-six.
        parameters: the measure's own, such as ``beta`` of euclidean, ``sigma_fraction`` of nonlinear, ``centered`` and
            ``transposed`` of linear.

    Raises:
        ValueError: for an unknown measure or parameter, or a value that is out of range.
    """

    def __init__(
        self,
        measure: str = "linear",
        weight: float = 1e-2,
        *,
        on: str = "features",
        samples: str = "tokens",
        layers: str | None = None,
        reduction: str = "mean",
        **parameters: Any,
    ) -> None:
        if measure not in REGULARIZERS:
            close = difflib.get_close_matches(measure, REGULARIZERS, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ";"
            raise ValueError(f"unknown regularizer {measure!r}{hint} choose from {', '.join(REGULARIZERS)}")
        if not weight >= 0:
            raise ValueError(f"weight is {weight}; expected 0 or more, since the penalty is minimised")
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction is {reduction!r}; expected one of {', '.join(REDUCTIONS)}")
        takes = _parameters(measure)
        if unknown := sorted(set(parameters) - set(takes)):
            raise ValueError(
                f"{measure} takes no {', '.join(unknown)}; its parameters are {', '.join(takes) or 'none'}"
            )
        Captured(on, samples), layer_pattern(layers)  # raise for what does not exist
        REGULARIZERS[measure](torch.ones(1, 2), torch.ones(2, 1), **parameters)  # likewise
        self.measure, self.weight, self.reduction, self.parameters = measure, weight, reduction, parameters
        self.on, self.samples, self.layers = on, samples, layers

    def capture(self, model: nn.Module) -> AbstractContextManager[Captured]:
        """`capture(model)` with this penalty's `on`, `samples` and `layers`."""
        return capture(model, on=self.on, samples=self.samples, layers=self.layers)

    def __call__(self, subspaces: Mapping[str, Subspaces]) -> dict[str, Tensor]:
        """What `capture` collected -> {"resora_<measure>": weighted scalar}.

        A layer of rank 1 has no pair of subspaces, and is left out.

        Raises:
            ValueError: if no layer with two subspaces was captured, or with other options than this penalty's.
        """
        if isinstance(subspaces, Captured) and (subspaces.on, subspaces.samples) != (self.on, self.samples):
            raise ValueError(
                f"{self} needs subspaces captured with on={self.on!r}, samples={self.samples!r}, but these have "
                f"on={subspaces.on!r}, samples={subspaces.samples!r}; use `with resora.capture(model) as subspaces:`"
            )
        if isinstance(subspaces, Captured) and subspaces.open:
            raise ValueError("subspaces are filled when the context is left: call the penalty behind the with block")
        pattern = layer_pattern(self.layers)
        chosen = {name: pair for name, pair in subspaces.items() if pattern.search(name)}
        if not chosen:
            raise ValueError(
                "no subspaces to regularize: run the model, with its adapters switched on, inside "
                "`with resora.capture(model) as subspaces:` first"
            )
        found = [self._values(layers) for layers in _alike(with_pairs(chosen).values())]
        values = torch.cat([each.to(found[0].device) for each in found])
        return {f"resora_{self.measure}": self.weight * (values.mean() if self.reduction == "mean" else values.sum())}

    def _values(self, layers: list[Subspaces]) -> Tensor:
        """The measure of layers of equal shapes, computed together: a third of the time of one by one, or less."""
        activations, bases = zip(*layers, strict=True)
        return REGULARIZERS[self.measure](torch.stack(activations), torch.stack(bases), **self.parameters)

    def __repr__(self) -> str:
        options = {"on": "features", "samples": "tokens", "layers": None, "reduction": "mean"}
        settings = [(key, getattr(self, key), default) for key, default in options.items()]
        settings += [(key, value, _parameters(self.measure)[key]) for key, value in self.parameters.items()]
        changed = "".join(f", {key}={value!r}" for key, value, default in settings if value != default)
        return f"ReSoRA({self.measure!r}, weight={self.weight}{changed})"


def _alike(subspaces: Iterable[Subspaces]) -> Iterable[list[Subspaces]]:
    """Group layers of equal shapes and types."""
    groups: dict[Any, list[Subspaces]] = {}
    for pair in subspaces:
        key = tuple((tensor.shape, tensor.dtype, tensor.device) for tensor in pair)
        groups.setdefault(key, []).append(pair)
    return groups.values()


def _parameters(measure: str) -> dict[str, Any]:
    """The measure's own parameters and their defaults."""
    parameters = list(inspect.signature(REGULARIZERS[measure]).parameters.values())[2:]
    return {parameter.name: parameter.default for parameter in parameters}

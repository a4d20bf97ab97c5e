"""ReSoRA: a weighted redundancy penalty over every captured layer (section 3.3 of the paper)."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from regularizers.linear import linear
from regularizers.subspaces import Subspaces

# A measure takes activations (N, r) and basis (r, d_out) and returns a scalar: one file and one line here.
REGULARIZERS: dict[str, Callable[..., Tensor]] = {
    "linear": linear,
}


class ReSoRA:
    """The penalty to add to a task's loss: weight x the mean of a measure over the adapted layers.

    The paper applies the measure to each LoRA component on its own; whether it sums or averages over layers it does
    not say. The mean is taken, so that the weight means the same for two layers and for thirty-six.

    Args:
        measure: a name in `REGULARIZERS`.
        weight: the penalty's weight. Default: 1e-2; the paper gives none.

    Raises:
        ValueError: for an unknown measure or a negative weight.
    """

    def __init__(self, measure: str = "linear", weight: float = 1e-2) -> None:
        if measure not in REGULARIZERS:
            close = difflib.get_close_matches(measure, REGULARIZERS, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ";"
            raise ValueError(f"unknown regularizer {measure!r}{hint} choose from {', '.join(REGULARIZERS)}")
        if weight < 0:
            raise ValueError(f"weight is {weight}; expected 0 or more, since the penalty is minimised")
        self.measure, self.weight = measure, weight

    def __call__(self, subspaces: Mapping[str, Subspaces]) -> dict[str, Tensor]:
        """What `capture` collected -> {"resora_<measure>": weighted scalar}.

        Raises:
            ValueError: if nothing was captured.
        """
        if not subspaces:
            raise ValueError(
                "no subspaces to regularize: run the model inside `with capture(model) as subspaces:` first"
            )
        measure = REGULARIZERS[self.measure]
        values = torch.stack([measure(activations, basis) for activations, basis in subspaces.values()])
        return {f"resora_{self.measure}": self.weight * values.mean()}

    def __repr__(self) -> str:
        return f"ReSoRA({self.measure!r}, weight={self.weight})"

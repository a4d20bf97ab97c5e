"""The pair that an adapter shows and a regularizer sees."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor


class Subspaces(NamedTuple):
    """The r rank-1 parts of one low-rank update on N samples: delta[n] = sum_i activations[n, i] basis[i] (Eq. 4)."""

    activations: Tensor
    """(N, r), with the adapter's scale folded in and, in training, after its dropout."""
    basis: Tensor
    """(r, d_out)."""


def with_pairs(layers: Mapping[str, Subspaces]) -> dict[str, Subspaces]:
    """The layers that have two subspaces or more; raises ValueError, with a layer's name, if there is none."""
    found = {name: layer for name, layer in layers.items() if len(layer.basis) > 1}
    if not found:
        raise ValueError(
            f"{next(iter(layers))} has rank 1, as every layer here: with a single subspace there is no redundancy "
            "between subspaces; use a rank of 2 or more"
        )
    return found


ON = ("features", "weights")
SAMPLES = ("tokens", "mean")


class Captured(dict[str, Subspaces]):
    """ "<layer>.<role>" -> Subspaces, and what they are: parts of features or of weights, by token or averaged."""

    def __init__(self, on: str = "features", samples: str = "tokens") -> None:
        super().__init__()
        if on not in ON:
            raise ValueError(f"on is {on!r}; expected one of {', '.join(ON)}")
        if samples not in SAMPLES:
            raise ValueError(f"samples is {samples!r}; expected one of {', '.join(SAMPLES)}")
        self.on, self.samples = on, samples
        self.open = False

    def close(self) -> None:
        """What `capture` calls when its context is left."""
        self.open = False

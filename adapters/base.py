"""What an adapter is.

An adapter is a frozen configuration with one method, `apply(model)`, that puts its trainable parts into a frozen
model. A low-rank adapter puts branches into linear layers, and all that a branch has to show is its subspaces: for
inputs x (N, d_in)

    dY = activations @ basis        activations (N, r), basis (r, d_out)

a sum of r rank-1 parts (Eq. 4 of the ReSoRA paper). The forward pass, merging and every regularizer are made of that
pair.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar, Protocol, cast, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Adapter(Protocol):
    """A method of parameter-efficient fine-tuning: a frozen dataclass of its settings."""

    name: ClassVar[str]

    def apply(self, model: nn.Module) -> None:
        """Put the trainable parts into `model`, in which nothing trains yet."""


@runtime_checkable
class LowRankAdapter(Adapter, Protocol):
    """An adapter whose saved file can be read without the model that it was trained in (`adapters.stored`)."""

    def stored_subspaces(self, tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """The tensors of a file that `save` wrote -> "<layer>.<role>": the pair of `AdaptedLinear.weight_subspaces`."""
        ...


class Branch(Protocol):
    """The low-rank update of one slice of a linear layer, an `nn.Module`."""

    def subspaces(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (N, d_in) -> activations (N, r) with the scale folded in, basis (r, d_out)."""


class AdaptedLinear(nn.Linear):
    """A linear layer with low-rank branches, each on a slice of its outputs (the q of a fused qkv, say).

    A layer becomes adapted in place (`adapt`): it stays the same object with the same `weight` and `bias`, so hooks,
    shared modules and the backbone's state-dict keys are untouched, and it becomes the stock class again when it is
    merged.
    """

    branches: nn.ModuleDict
    slices: dict[str, tuple[int, int]]
    # Called with (role, activations, basis, shape of the input without its last dimension) while someone captures.
    record: Callable[[str, Tensor, Tensor, torch.Size], None] | None
    stock_class: type[nn.Linear]

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d_in) -> (..., d_out)."""
        flat = x.reshape(-1, self.in_features)
        out = F.linear(flat, self.weight, self.bias)
        for role, branch in self.branches.items():
            activations, basis = cast(Branch, branch).subspaces(flat)
            if self.record is not None:
                self.record(role, activations, basis, x.shape[:-1])
            start, stop = self.slices[role]
            rows = out if stop - start == self.out_features else out[:, start:stop]
            # In place: the update is accumulated by the product itself, without another pass over the output.
            rows.addmm_(activations.to(out.dtype), basis.to(out.dtype))
        return out.view(*x.shape[:-1], self.out_features)

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles that have a branch, such as ("q", "v")."""
        return tuple(self.branches)

    def weight_subspaces(self, role: str) -> tuple[Tensor, Tensor]:
        """The rank-1 parts of the update's weight: the identity as input, activations (d_in, r), basis (r, d_out)."""
        branch = self.branches[role]
        training, dtype = branch.training, next(branch.parameters()).dtype
        try:
            identity = torch.eye(self.in_features, device=self.weight.device, dtype=dtype)
            return cast(Branch, branch.eval()).subspaces(identity)  # without dropout
        finally:
            branch.train(training)

    @torch.no_grad()
    def merge(self) -> None:
        """Add each branch to its rows of the weight, in float32, and become a stock layer again."""
        for role, branch in self.branches.items():
            branch.float()
            activations, basis = self.weight_subspaces(role)
            start, stop = self.slices[role]
            rows = self.weight[start:stop]
            rows.copy_(rows.float() + (activations @ basis).T)
        stock_class = self.stock_class
        for attribute in ("branches", "slices", "record", "stock_class"):
            delattr(self, attribute)
        self.__class__ = stock_class  # type: ignore[assignment]  # the way back from `adapt`


def adapt(linear: nn.Linear, role: str, rows: tuple[int, int], branch: nn.Module) -> None:
    """Give `linear` a branch on its output rows `rows`, turning it into an `AdaptedLinear` in place."""
    if not isinstance(linear, AdaptedLinear):
        stock_class = cast(type[nn.Linear], type(linear))
        linear.__class__ = AdaptedLinear
        adapted = cast(AdaptedLinear, linear)
        adapted.branches, adapted.slices, adapted.record, adapted.stock_class = nn.ModuleDict(), {}, None, stock_class
    adapted = cast(AdaptedLinear, linear)
    adapted.branches[role] = branch.train(linear.training)
    adapted.slices[role] = rows


def branch_tensors(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors of a saved file that belong to branches: "<layer>.<role>" -> {"A": ..., "B": ...}, in their order."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        layer, separator, rest = name.rpartition(".branches.")
        if separator:
            role, _, parameter = rest.partition(".")
            found.setdefault(f"{layer}.{role}", {})[parameter] = tensor
    return found

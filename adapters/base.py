"""What an adapter is.

An adapter is a frozen configuration with one method, `apply(model)`, that puts its trainable parts into a frozen
model. A low-rank adapter puts branches into linear maps, and all that a branch has to show is its subspaces: for
inputs x (N, d_in)

    dY = activations @ basis        activations (N, r), basis (r, d_out)

a sum of r rank-1 parts (Eq. 4 of the ReSoRA paper). The forward pass, merging and every regularizer are made of that
pair. A branch gives it as two factors of a matrix, down (r, d_in) and basis (r, d_out), with activations = x down^T.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar, Protocol, cast, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapters.extend import Extension, restore
from adapters.fused_linear import Update, low_rank_linear

Record = Callable[[str, Tensor, Tensor, torch.Size], None]
"""Called with (role, activations, basis, shape of the input without its last dimension) while someone captures."""


class Adapter(Protocol):
    """A method of parameter-efficient fine-tuning: a frozen dataclass of its settings.

    Attributes:
        name: its key in `ADAPTERS`.
        not_mergeable: why it cannot be folded into the backbone's weights; "" where it can.
    """

    name: ClassVar[str]
    not_mergeable: ClassVar[str]

    def apply(self, model: nn.Module) -> None:
        """Put the trainable parts into `model`, in which nothing trains yet."""


@runtime_checkable
class LowRankAdapter(Adapter, Protocol):
    """An adapter whose saved file can be read without the model that it was trained in (`adapters.stored`)."""

    def stored_subspaces(self, tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """The tensors of a file that `save` wrote -> "<layer>.<role>": the pair of `Branched.weight_subspaces`."""
        ...


@runtime_checkable
class PenalizedAdapter(Adapter, Protocol):
    """An adapter with a penalty of its own (AdaLoRA's orthogonality)."""

    def loss_parts(self, model: nn.Module) -> dict[str, Tensor]:
        """What is added to the loss in training: scalars with their weight in, each named "<adapter>_<what>"."""
        ...


@runtime_checkable
class ScheduledAdapter(Adapter, Protocol):
    """An adapter that changes its own parameters while it trains (AdaLoRA's ranks).

    What it has to remember are persistent buffers of the modules that hold its parameters: they are in its file.
    """

    def after_step(self, model: nn.Module, step: int, total_steps: int) -> None:
        """Called after each step of the optimiser, while its gradients are there.

        Args:
            model: that holds the adapter.
            step: optimiser steps so far, with this one: from 1, in the first stage of a training. In later ones only
                step > total_steps holds: the schedule is over.
            total_steps: steps of the first stage, over which a schedule extends, while that lasts.
        """
        ...


class Branch(nn.Module):
    """The low-rank update of one slice of a linear map.

    Attributes:
        dropout: probability of dropping an input in training.
    """

    dropout: float = 0.0

    def factors(self) -> tuple[Tensor, Tensor]:
        """down (r, d_in) with the scale folded in, basis (r, d_out): the update of the weight is (down^T basis)^T."""
        raise NotImplementedError

    def activations(self, x: Tensor, down: Tensor) -> Tensor:
        """x (N, d_in), down (r, d_in) of `factors` -> (N, r) = dropout(x) down^T."""
        return F.linear(F.dropout(x, self.dropout, self.training), down)

    @property
    def drops(self) -> bool:
        """Whether something is dropped now, so that the activations are not x down^T."""
        return self.training and self.dropout > 0


class Branched(Extension):
    """A module with a linear map that has low-rank branches, each on a slice of its outputs (the q of a fused qkv).

    Attributes:
        branches: by role, such as "q".
        slices: role -> the rows of the weight, start and stop, that the branch updates.
        record: what a forward pass calls for each branch, or None. `regularizers.capture` sets it.
    """

    added = ("branches", "slices", "record")
    branches: nn.ModuleDict
    slices: dict[str, tuple[int, int]]
    record: Record | None

    def linear_map(self) -> tuple[Tensor, Tensor | None]:
        """The weight (d_out, d_in) and the bias (d_out,) that the branches belong to."""
        raise NotImplementedError

    def project(self, x: Tensor, rows: tuple[int, int] | None = None) -> Tensor:
        """x (..., d_in) -> (..., d_out): the linear map and its branches; with `rows`, those that lie in them alone."""
        weight, bias = self.linear_map()
        slices = self.slices
        if rows is not None:
            first, last = rows
            weight, bias = weight[first:last], None if bias is None else bias[first:last]
            slices = {role: (i - first, j - first) for role, (i, j) in slices.items() if first <= i < last}
        branches = [cast(Branch, self.branches[role]) for role in slices]
        updates = [Update(*branch.factors(), *slices[role]) for role, branch in zip(slices, branches, strict=True)]
        activations: list[Tensor] = []
        # A penalty whose gradient comes later (`replays`) has to find the activations among what autograd sees.
        if hasattr(self.record, "replays") or any(branch.drops for branch in branches):
            flat = x.reshape(-1, weight.shape[1])
            activations = [branch.activations(flat, each.down) for branch, each in zip(branches, updates, strict=True)]
        out, together = low_rank_linear(x, weight, bias, updates, activations)
        if self.record is not None:
            if together is not None:
                activations = [each.T for each in together.split([len(update.down) for update in updates])]
            for role, each, update in zip(slices, activations, updates, strict=True):
                self.record(role, each, update.basis, x.shape[:-1])
        return out.view(*x.shape[:-1], weight.shape[0])

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles that have a branch, such as ("q", "v")."""
        return tuple(self.branches)

    def weight_subspaces(self, role: str) -> tuple[Tensor, Tensor]:
        """The rank-1 parts of the update's weight: activations down^T (d_in, r), basis (r, d_out)."""
        down, basis = cast(Branch, self.branches[role]).factors()
        return down.T, basis

    @torch.no_grad()
    def merge(self) -> None:
        """Add each branch to its rows of the weight, in float32 at least, and become a stock module again."""
        weight, _ = self.linear_map()
        wide = torch.promote_types(weight.dtype, torch.float32)
        self.branches.to(wide)
        for role in self.branches:
            activations, basis = self.weight_subspaces(role)
            start, stop = self.slices[role]
            rows = weight[start:stop]
            rows.copy_(rows.to(wide) + (activations @ basis).T)
        restore(self)


class AdaptedLinear(Branched, nn.Linear):
    """A linear layer with branches."""

    def linear_map(self) -> tuple[Tensor, Tensor | None]:
        return self.weight, self.bias

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d_in) -> (..., d_out)."""
        return self.project(x)


def branch_tensors(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors of a saved file that belong to branches: "<layer>.<role>" -> {"A": ..., "B": ...}, in their order."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        layer, separator, rest = name.rpartition(".branches.")
        if separator:
            role, _, parameter = rest.partition(".")
            found.setdefault(f"{layer}.{role}", {})[parameter] = tensor
    return found


@torch.no_grad()
def stored_pair(make: Callable[[], Branch], tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The pair of `Branched.weight_subspaces`, for a branch as `make` builds it with the values of a file."""
    with torch.device("meta"):  # no memory and no random numbers for values that are replaced
        branch = make()
    branch.load_state_dict(tensors, assign=True)
    down, basis = branch.factors()
    return down.T, basis

"""Record the rank-1 subspaces of every low-rank update while a model runs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from regularizers.layers import LowRankLayer, Record, low_rank_layers
from regularizers.padding import Padding, watch_padding
from regularizers.reentrant import in_reentrant_checkpoint
from regularizers.subspaces import Captured, Subspaces
from regularizers.wrappers import check_unsharded, unwrapped


@contextmanager
def capture(
    model: nn.Module, *, on: str = "features", samples: str = "tokens", layers: str | None = None
) -> Iterator[Captured]:
    """Collect the subspaces of every adapted layer of `model` that runs inside the context.

        with capture(model) as subspaces:
            output = model(inputs)
        penalty = ReSoRA("linear", weight=1e-2)(subspaces)

    Nothing is computed twice: the activations are those of the forward pass itself, with their graph. The adapters of
    this suite and `peft.PeftModel` work alike; of PEFT's adapters those take part that are switched on. A layer that
    runs several times in the context adds up its samples. Under DDP each process sees the samples of its own batch.

    Samples are tokens, pixels or frames. A padding token is none. It is known by a 2-D argument of the innermost module
    around the layer that takes one: `attention_mask` (batch, length), zero at padding (`encoder_attention_mask` where
    only that has the length of the layer's input), or torch's `src_`, `tgt_`, `memory_` and `key_padding_mask`, True at
    padding. In a text tower of open_clip, what comes after the end of a text is padding. What is called without any of
    these has none.

    The model is recorded in whatever mode it is, so open a context in training steps alone: in evaluation, as outside
    of a context, nothing is computed or kept then. The plug-ins do so. Where a layer runs with a graph and, under the
    caller's `no_grad`, without (a teacher's pass), the samples of the latter are left out.

    Close the context before `backward`, so that gradient checkpointing does not record its second forward pass. Under
    checkpointing in the reentrant mode, call `backward` before the next capture, and add the penalty to the loss
    instead of calling its `backward` alone: its gradient reaches the layer with that of the loss.

    Args:
        model: holds low-rank layers; may be wrapped in DistributedDataParallel.
        on: "features", or "weights" (the paper's Table 4): the identity in place of the samples, so that the
            activations are A^T (d_in, r). Weights are read on entry; the model need not run.
        samples: "tokens", or "mean": one sample for each item of the batch, the mean over its tokens.
        layers: a regular expression; only layers whose name "<layer>.<role>" it is found in are recorded.

    Yields:
        Captured: a dict "<layer>.<role>" -> Subspaces, filled when the context is left. The role is a target
        ("q") of this suite's adapters, and the adapter's name ("default") for PEFT's.

    Raises:
        ValueError: if the model holds no layer to capture, is compiled or has its parameters sharded; if a mask's
            positions cannot be matched with a layer's.
        RuntimeError: inside another capture of the same model, where its adapter is one of this suite; before the
            backward pass of an earlier capture under reentrant checkpointing.
    """
    captured = Captured(on, samples)
    model = unwrapped(model)
    found = low_rank_layers(model)
    if not found:
        raise ValueError(f"{type(model).__name__} holds no low-rank layer: inject an adapter such as LoRA first")
    check_unsharded(model, found)
    pattern = layer_pattern(layers)
    chosen = {name: [role for role in layer.roles if pattern.search(f"{name}.{role}")] for name, layer in found.items()}
    if layers is not None and not any(chosen.values()):
        names = [f"{name}.{role}" for name, layer in found.items() for role in layer.roles]
        raise ValueError(
            f"layers={layers!r} is found in no low-rank layer; their names are {', '.join(names[:3])}, ..."
        )
    if on == "weights":
        for name, roles in chosen.items():
            captured |= {f"{name}.{role}": Subspaces(*found[name].weight_subspaces(role)) for role in roles}
        yield captured
        return
    recordings: list[_Recording] = []
    with watch_padding(model, [name for name, roles in chosen.items() if roles]) as padding, ExitStack() as stack:
        for name, roles in chosen.items():
            if roles:
                record = _recorder(recordings, name, found[name], padding)
                stack.enter_context(found[name].listen(record, roles))
        captured.open = True
        stack.callback(captured.close)
        yield captured
    places = cache(_places)  # of each mask once: a device is asked for their number, and waited for
    with_graph = {(recording.layer, recording.role) for recording in recordings if recording.has_graph}
    for recording in recordings:
        if not recording.has_graph and (recording.layer, recording.role) in with_graph:
            continue
        if recording.repeated:
            found[recording.layer].replay(recording.role, recording.activations)
        activations = recording.samples(samples, places)
        key = f"{recording.layer}.{recording.role}"
        if (earlier := captured.get(key)) is not None:
            activations = torch.cat([earlier.activations, activations])
        captured[key] = Subspaces(activations, recording.basis)


class _Recording(NamedTuple):
    """One forward pass of one low-rank update, as the layer computed it."""

    layer: str
    role: str
    activations: Tensor
    basis: Tensor
    shape: torch.Size
    scale: float
    mask: Tensor | None
    """True at real tokens; None if all are."""
    has_graph: bool
    """Or will have one: see `repeated`."""
    repeated: bool
    """In the backward pass, by reentrant gradient checkpointing (see `regularizers.reentrant`)."""

    def samples(self, kind: str, places: Callable[[Tensor, str], Tensor]) -> Tensor:
        """(N, r): one row for each real token, or for each item its mean over them. `places`: see `_places`."""
        activations = self.activations if self.scale == 1.0 else self.activations * self.scale
        if kind == "tokens" or len(self.shape) < 2:
            rows = activations.reshape(-1, activations.shape[-1])
            return rows if self.mask is None else rows.index_select(0, places(self.mask, kind).to(rows.device))
        items = activations.reshape(*self.shape, -1)
        if self.mask is None:
            return items.flatten(1, -2).mean(dim=1)
        weight = self.mask.to(items)[..., None]  # the mask may be on another device
        means = (items * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)
        return means.index_select(0, places(self.mask, kind).to(means.device))


def _places(mask: Tensor, kind: str) -> Tensor:
    """Which tokens of a mask (batch, length), counted through, or which of its items have a real token."""
    real = mask.reshape(-1) if kind == "tokens" else mask.any(dim=1)  # an item of padding alone is none
    return real.nonzero().squeeze(1)


def layer_pattern(layers: str | None) -> re.Pattern[str]:
    """The compiled expression; None is found in every name. Raises ValueError if it is no regular expression."""
    try:
        return re.compile(layers or "")
    except re.error as error:
        raise ValueError(f"layers={layers!r} is no regular expression: {error}") from None


def _recorder(recordings: list[_Recording], name: str, layer: LowRankLayer, padding: Padding) -> Record:
    grad_wanted = torch.is_grad_enabled()

    def record(role: str, activations: Tensor, basis: Tensor, shape: torch.Size, scale: float = 1.0) -> None:
        mask = padding.mask_of(name, shape)
        has_graph = torch.is_grad_enabled()
        repeated = grad_wanted and not has_graph and in_reentrant_checkpoint()
        if repeated:
            if any((earlier.layer, earlier.role) == (name, role) and earlier.has_graph for earlier in recordings):
                raise ValueError(
                    f"{name} ran twice under reentrant gradient checkpointing, and which pass is repeated first is not "
                    "known; use the other mode, gradient_checkpointing_kwargs={'use_reentrant': False}, and run passes "
                    "that need no gradient (a teacher's) outside of the context"
                )
            activations = activations.detach().requires_grad_()
            with torch.enable_grad():
                _, basis = layer.weight_subspaces(role)
        recordings.append(
            _Recording(name, role, activations, basis, shape, scale, mask, has_graph or repeated, repeated)
        )

    return record

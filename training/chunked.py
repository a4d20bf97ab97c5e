"""Large batches on small memory: the gradients of a whole batch with the graph of one chunk at a time.

A contrastive loss compares every pair of a batch, and a penalty its samples over the whole batch, so that averaging the
losses of small batches is not the same. But both depend on the batch through small tensors only: embeddings (B, D), and
for a penalty the activations (N, r) of each adapted layer. So (Gao et al., "Scaling Deep Contrastive Learning Batch
Size under Memory Limited Setup", 2021, https://arxiv.org/abs/2101.06983, with activations as further embeddings)

1. every chunk runs without a graph, and its small tensors are kept,
2. the loss of all of them, and its gradients at them,
3. every chunk runs again, with a graph and the same dropout, and these gradients go back through it.

Memory is that of one chunk plus the small tensors; time that of one more forward pass. The result is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import get_device_states, set_device_states

from regularizers import Captured, ReSoRA, Subspaces


def check_chunkable(model: nn.Module) -> None:
    """Raise ValueError for a model whose items see each other inside it, through batch statistics."""
    was_training = model.training
    model.train()
    found = [name for name, module in model.named_modules() if isinstance(module, _BatchNorm) and module.training]
    model.train(was_training)
    if found:
        raise ValueError(
            f"chunk_size does not go with the batch norm {found[0]}: the statistics of a chunk are not those of the "
            "batch; use chunk_size=null, or a model without batch norm (CLIP4Clip has none, VSE-infinity has)"
        )


def chunked_backward(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    chunk_size: int,
    loss: Callable[[Any, Captured], Tensor],
    regularizer: ReSoRA | None = None,
) -> Tensor:
    """Add the gradients of the loss of a whole batch to `.grad`, with the graph of one chunk at a time.

    Args:
        model: in training mode; of a model in DistributedDataParallel the gradients are averaged over the processes, as
            its own backward pass would. It returns a tensor or a dict of them; those with dimensions have a row an
            item, and scalars depend on no item.
        inputs: keyword arguments of the model with a row an item each, B rows.
        chunk_size: items at a time.
        loss: (what the model would return for the batch, its subspaces) -> a scalar.
        regularizer: whose `capture` the subspaces are of; None for none.

    Returns:
        The loss, without graph.

    Raises:
        ValueError: where a tensor does not have a row an item.
    """
    plain = cast(nn.Module, model.module) if isinstance(model, DistributedDataParallel) else model
    on_features = regularizer is not None and regularizer.on == "features"

    def listen() -> AbstractContextManager[Any]:
        return cast(ReSoRA, regularizer).capture(plain) if on_features else nullcontext({})

    chunks = _split(inputs, chunk_size)
    random_states = []
    cache = _Cache()
    with torch.no_grad():
        for number, chunk in enumerate(chunks):
            random_states.append((torch.get_rng_state(), *get_device_states(*chunk.values())))
            with listen() as subspaces:
                outputs = plain(**chunk)
            cache.add(number, outputs, subspaces, rows=len(next(iter(chunk.values()))))
    cache.close()

    if regularizer is not None and not on_features:  # of weights: the batch does not enter
        with regularizer.capture(plain) as of_weights:
            pass
        value = loss(cache.outputs, of_weights)
    else:
        value = loss(cache.outputs, cache.subspaces(regularizer))
    value.backward()

    for number, chunk in enumerate(chunks):
        torch.set_rng_state(random_states[number][0])
        set_device_states(*random_states[number][1:])
        with listen() as subspaces:
            outputs = plain(**chunk)
        if any(wanted := cache.gradients(number, outputs, subspaces)):
            torch.autograd.backward(*wanted)
    if isinstance(model, DistributedDataParallel) and model.require_backward_grad_sync:
        _average_gradients(plain)
    return value.detach()


class _Cache:
    """The small tensors of all chunks: first in pieces, then each as one leaf whose gradient is wanted."""

    def __init__(self) -> None:
        self.pieces: dict[tuple[str, ...], dict[int, Tensor]] = {}  # a chunk without frames has none of the image tower
        self.leaves: dict[tuple[str, ...], Tensor] = {}
        self.one_tensor = False

    def add(self, number: int, outputs: Any, subspaces: Mapping[str, Subspaces], rows: int) -> None:
        self.one_tensor = isinstance(outputs, Tensor)
        for key, tensor in _named(outputs, subspaces).items():
            if key[0] == "output" and tensor.ndim and len(tensor) != rows:
                raise ValueError(
                    f"chunk_size needs a row an item of all that the model returns, but of {rows} items it returns "
                    f"{key[1] or 'a tensor'} of shape {tuple(tensor.shape)}"
                )
            self.pieces.setdefault(key, {})[number] = tensor

    def close(self) -> None:
        """Join the pieces; of a scalar and of a basis, which are the same in each chunk, the last is taken."""
        for key, pieces in self.pieces.items():
            last = pieces[max(pieces)]
            leaf = (last if _shared(key, last) else torch.cat(list(pieces.values()))).detach().clone()
            self.leaves[key] = leaf.requires_grad_(leaf.is_floating_point())

    @property
    def outputs(self) -> Any:
        """What the model would return for the whole batch."""
        found = {key[1]: leaf for key, leaf in self.leaves.items() if key[0] == "output"}
        return found[""] if self.one_tensor else found

    def subspaces(self, regularizer: ReSoRA | None) -> Captured:
        """What would be captured of the whole batch."""
        captured = Captured("features", regularizer.samples) if regularizer else Captured()
        for kind, name in self.leaves:
            if kind == "activations":
                captured[name] = Subspaces(self.leaves[kind, name], self.leaves["basis", name])
        return captured

    def gradients(
        self, number: int, outputs: Any, subspaces: Mapping[str, Subspaces]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The tensors of chunk `number`, with their graph, and the loss's gradient at each; shared ones come once."""
        tensors, gradients = [], []
        for key, tensor in _named(outputs, subspaces).items():
            gradient, pieces = self.leaves[key].grad, self.pieces[key]
            if gradient is None or not tensor.requires_grad:
                continue
            if not _shared(key, tensor):
                start = sum(len(piece) for earlier, piece in pieces.items() if earlier < number)
                gradient = gradient[start : start + len(tensor)]
            elif number < max(pieces):
                continue
            tensors.append(tensor)
            gradients.append(gradient)
        return tensors, gradients


def _average_gradients(model: nn.Module) -> None:
    """The mean over the processes, of every parameter that has a gradient in one of them."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    has_gradient = torch.tensor([float(p.grad is not None) for p in trained], device=trained[0].device)
    dist.all_reduce(has_gradient)
    for parameter in (p for p, having in zip(trained, has_gradient.tolist(), strict=True) if having):
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size()


def _named(outputs: Any, subspaces: Mapping[str, Subspaces]) -> dict[tuple[str, ...], Tensor]:
    named: dict[tuple[str, ...], Tensor] = {}
    for name, tensor in ({"": outputs} if isinstance(outputs, Tensor) else outputs).items():
        named["output", name] = tensor
    for name, pair in subspaces.items():
        named["activations", name], named["basis", name] = pair
    return named


def _shared(key: tuple[str, ...], tensor: Tensor) -> bool:
    return key[0] == "basis" or tensor.ndim == 0


def _split(inputs: Mapping[str, Tensor], chunk_size: int) -> list[dict[str, Tensor]]:
    if len(lengths := {len(tensor) for tensor in inputs.values()}) != 1:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in inputs.items())
        raise ValueError(f"chunk_size needs inputs with a row an item each, but got {shapes}")
    starts = range(0, lengths.pop(), chunk_size)
    return [{name: tensor[start : start + chunk_size] for name, tensor in inputs.items()} for start in starts]

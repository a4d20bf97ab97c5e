"""What a computation costs: exact FLOPs, bytes and elements, and its time relative to another's.

Counts do not depend on the load of the machine; times do, so only ratios of neighbouring runs are kept.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

# Matrix products that torch's counter passes over, by the shapes of their arguments: the branch of an adapted layer
# and attention on the CPU.
MORE_FLOPS: dict[Any, Callable[..., int]] = {
    torch.ops.aten.addmm_: lambda out, left, right, **_: 2 * left[0] * left[1] * right[1],
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *_, **__: (
        sdpa_backward_flop_count(grad, q, k, v)
    ),
}


@dataclass(frozen=True)
class Counts:
    """What one run costs, exactly and without a clock."""

    flops: int
    """Of matrix products, convolutions and attention, two for a multiply-add."""
    elementwise: int
    """Numbers that elementwise operations wrote; torch's FLOP counter leaves them out."""
    kept_bytes: int
    """Of the tensors that the forward pass made and that are still alive when the backward pass starts."""
    peak_bytes: int
    """Of all tensors alive at the worst moment, weights and optimiser state included."""
    largest: int
    """Elements of the largest tensor that was made."""


class LiveStorages(TorchDispatchMode):
    """Follow every tensor storage from the operation that makes it until it is freed.

    Tensors are seen as operations return them, in forward, backward and optimiser; scratch memory inside one operation
    (the packed tiles of a matrix product, say) is not.

    Args:
        alive: tensors that exist already.
    """

    def __init__(self, alive: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = self.largest = self.elementwise = 0
        self._bytes: dict[int, int] = {}
        for tensor in alive:
            self._see(tensor)
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._see(tensor)
                if torch.Tag.pointwise in func.tags:
                    self.elementwise += tensor.numel()
        return out

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._bytes:  # a view, or written in place
            return
        self._bytes[address] = storage.nbytes()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        self.largest = max(self.largest, tensor.numel())
        weakref.finalize(storage, self._free, address).atexit = False

    def _free(self, address: int) -> None:
        self.live -= self._bytes.pop(address)


def count(forward: Callable[[], Tensor], backward: Callable[[Tensor], object], alive: Iterable[Tensor] = ()) -> Counts:
    """Run ``backward(forward())`` twice and count, bytes first and then FLOPs.

    Args:
        forward: returns what `backward` takes, a loss.
        backward: all the rest, such as the optimiser's step; has to leave things as `forward` found them.
        alive: the tensors that are there before: weights, optimiser state, the batch.
    """
    with LiveStorages(alive) as storages:
        before = storages.live
        loss = forward()
        kept = storages.live - before
        backward(loss)
        del loss
    with FlopCounterMode(display=False, custom_mapping=MORE_FLOPS) as counter:
        backward(forward())
    return Counts(
        flops=counter.get_total_flops(),
        elementwise=storages.elementwise,
        kept_bytes=kept,
        peak_bytes=storages.peak,
        largest=storages.largest,
    )


def resident_peak() -> int:
    """The most memory that this process has had, in bytes, as the operating system counts it."""
    status = Path("/proc/self/status")
    if status.exists():  # not getrusage: on Linux a new process inherits the peak of the one that started it
        (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        return int(line.split()[1]) * 1024
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def paired_ratios(
    plain: Callable[[], object],
    measured: Callable[[], object],
    pairs: int,
    *,
    warm_up: int = 2,
    progress: Callable[[], object] = lambda: None,
) -> list[float]:
    """Time of `measured` over that of `plain`, run one right after the other: `round_ratios` of two.

    Args:
        pairs: how many ratios.
        warm_up: pairs to run first that do not count.
        progress: called after each pair.
    """
    (ratios,) = round_ratios(plain, [measured], pairs, warm_up=warm_up, progress=progress)
    return ratios


def round_ratios(
    plain: Callable[[], object],
    measured: Sequence[Callable[[], object]],
    rounds: int,
    *,
    warm_up: int = 2,
    progress: Callable[[], object] = lambda: None,
) -> list[list[float]]:
    """For each of `measured` its time over that of `plain` in the same round, in which all run one after the other.

    What slows the machine for a while slows all of a round, and cancels. Each comes first as often as the others, and
    every other round runs backwards, so that nothing always follows the same.
    """
    all_of_them, ratios = [plain, *measured], [list[float]() for _ in measured]
    for index in range(warm_up + rounds):
        order = range(len(all_of_them))[:: -1 if index % 2 else 1]
        first = index // 2 % len(order)
        seconds = {number: _seconds(all_of_them[number]) for number in (*order[first:], *order[:first])}
        if index >= warm_up:
            for number, found in enumerate(ratios, start=1):
                found.append(seconds[number] / seconds[0])
        progress()
    return ratios


def _seconds(function: Callable[[], object]) -> float:
    start = perf_counter()
    function()
    return perf_counter() - start


def median_interval(ratios: list[float], resamples: int = 10_000) -> tuple[float, float, float]:
    """The median and its 95 % interval, by bootstrap: median, low, high."""
    drawn = np.random.default_rng(0).choice(ratios, size=(resamples, len(ratios)))
    low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5])
    return float(np.median(ratios)), float(low), float(high)

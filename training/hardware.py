"""Choose compute threads and precision by measurement, not by what the processor claims.

Two "cores" may be two threads of one core, where one compute thread is faster than two; bfloat16 halves the time on a
processor with units for it and multiplies it by forty on one without. A product of the size that a small BERT runs is
timed for each choice, in about one second.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from time import perf_counter
from typing import cast

import torch

PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class Hardware:
    """How a run computes. On one machine the same choice gives the same bits; a resumed run keeps its choice."""

    threads: int
    precision: str


def process_count() -> int:
    """Processes of this training; torchrun says so before they are connected."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def compute_device() -> torch.device:
    """Where transformers' Trainer would train: this process's accelerator, or the CPU."""
    if not torch.accelerator.is_available():
        return torch.device("cpu")
    kind = cast(torch.device, torch.accelerator.current_accelerator()).type
    return torch.device(kind, int(os.environ.get("LOCAL_RANK", "0")))


def device_name() -> str:
    """For people: "cpu", or what the accelerator calls itself."""
    device = compute_device()
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def check_devices() -> None:
    """Raise ValueError where one process sees several GPUs.

    transformers would run copies of the model (`nn.DataParallel`): a batch as many times as large, and a penalty that
    sees none of it. Processes of torchrun or `accelerate launch` have one GPU each.
    """
    devices = torch.cuda.device_count()
    if devices > 1 and int(os.environ.get("LOCAL_RANK", "-1")) < 0:
        raise ValueError(
            f"{devices} GPUs in one process; expected one in each. Take one with CUDA_VISIBLE_DEVICES=0, or all with "
            f"`torchrun --nproc_per_node {devices}` in place of `python`; trainer.batch_size is that of each process"
        )


def check_hardware(threads: int | None, precision: str | None) -> None:
    """Raise ValueError for fewer than one thread or an unknown precision; None, which is measured, is fine."""
    if threads is not None and (not isinstance(threads, int) or threads < 1):
        raise ValueError(f"threads is {threads!r}; expected at least 1, or null to measure")
    if precision is not None and precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; expected one of {', '.join(PRECISIONS)}, or null to measure")


def choose_hardware(threads: int | None = None, precision: str | None = None) -> Hardware:
    """The given threads and precision, or the fastest where they are None.

    bfloat16 is chosen only if it is at least 1.3 times faster: it also rounds. With an accelerator, and in each of
    several processes, which would time one another and may choose differently, nothing is measured: threads are torch's
    own default, and the precision is bfloat16 where an accelerator has units for it.

    Raises:
        ValueError: as `check_hardware`.
    """
    check_hardware(threads, precision)
    if torch.accelerator.is_available() or process_count() > 1:
        # Older GPUs (T4, V100) emulate it, slowly.
        fast = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
        return Hardware(threads or torch.get_num_threads(), precision or ("bfloat16" if fast else "float32"))

    def cost(count: int, name: str) -> float:
        return _seconds(count, getattr(torch, name)) * (1.3 if name == "bfloat16" and precision is None else 1.0)

    counts = [threads] if threads else list(range(1, min(cores(), 16) + 1))
    names = (precision,) if precision else PRECISIONS
    if len(counts) * len(names) == 1:
        return Hardware(counts[0], names[0])
    before = torch.get_num_threads()
    try:
        # Precision first, on one thread: timing every pair would take the sum of the slow ones.
        best = min(names, key=lambda name: cost(counts[0], name))
        return Hardware(min(counts, key=lambda count: cost(count, best)), best)
    finally:
        torch.set_num_threads(before)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _seconds(threads: int, dtype: torch.dtype, repeats: int = 8) -> float:
    """The fastest of a few (512, 384) x (384, 1536) products, in seconds."""
    torch.set_num_threads(threads)
    left, right = torch.randn(512, 384).to(dtype), torch.randn(384, 1536).to(dtype)
    times = []
    for _ in range(repeats):
        start = perf_counter()
        left @ right
        times.append(perf_counter() - start)
        if sum(times) > 0.5:
            break
    return min(times)

"""What a training step of each adapter costs, against full fine-tuning and against PEFT's LoRA, on this machine."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from time import perf_counter
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from adapters import ADAPTERS, LoRA, inject, merge
from benchmarks.adapted_models import (
    BACKBONES,
    OF_PAPER,
    PAIRS,
    PEFT,
    RANK,
    Pair,
    backbone,
    batch_of,
    step,
    trained_without_head,
    with_lora,
    with_method,
    with_peft,
    without_lora,
)
from benchmarks.adapters_page import page
from benchmarks.kept_rows import Rows
from benchmarks.machine import described, in_fresh_process
from benchmarks.measure import Counts, paired_ratios, resident_peak, round_ratios
from benchmarks.options import Options, option
from benchmarks.training_step import Step

PARTS = ("methods", "full", "peft", "merged")
PRECISIONS = ("float32", "bfloat16")
BATCHES = ("paper", "small")
WARM_UP = 2
TOO_SLOW = 0.2  # of float32's speed: a processor without units for bfloat16 would take hours
SKIPPED = {"full", "linear", "partial"}  # full is the reference; the others train parts of it


@dataclass(frozen=True, kw_only=True)
class Settings(Options):
    """What is run: all methods (in float32), LoRA against full fine-tuning and PEFT's, and merged models."""

    parts: tuple[str, ...] = option(PARTS, "what is measured; other rows stay as --output has them", choices=PARTS)
    precisions: tuple[str, ...] = option(PRECISIONS, "in which precisions", choices=PRECISIONS)
    backbones: tuple[str, ...] = option(BACKBONES, "what is adapted", choices=BACKBONES)
    layers: tuple[str, ...] = option((), "LoRA against PEFT's: of which layers, such as q k v; all by default")
    batches: tuple[str, ...] = option(BATCHES, "LoRA against PEFT's: with which batches", choices=BATCHES)
    methods: tuple[str, ...] = option((), "rows; all that go into the backbone by default")
    batch: int = option(4, "images in a step, and a quarter of its sentences")
    pairs: int = option(15, "pairs of steps for LoRA against full fine-tuning")
    few_pairs: int = option(5, "pairs of steps for the other rows")
    paper_batch: int = option(32, "images in a step for LoRA against PEFT's: the paper's batch")
    paper_rounds: int = option(12, "rounds of these steps: PEFT's, ours and that without LoRA")
    small_rounds: int = option(24, "rounds of the same with the small batch")
    merged_pairs: int = option(60, "pairs of a merged model's forward passes")
    tiny: bool = option(False, "two blocks of each backbone, to try it out")

    def __post_init__(self) -> None:
        super().__post_init__()
        if unknown := set(self.methods) - set(ADAPTERS):
            raise ValueError(f"unknown adapter {min(unknown)!r}; choose from {', '.join(ADAPTERS)}")
        compared = [pair.targets for pair in PAIRS if pair.backbone in self.backbones]
        if "peft" in self.parts and self.layers and self.layers not in compared:
            known = ", ".join(" ".join(targets) for targets in dict.fromkeys(compared))
            raise ValueError(f"layers are {' '.join(self.layers)}; expected one of: {known}")


def account(name: str, method: str, settings: Settings) -> tuple[Counts, int, int]:
    """Counts of one step, resident bytes at its peak, trained parameters without the head. In a fresh process."""
    torch.set_num_threads(settings.threads)
    libraries = resident_peak()
    measured = step(with_method(name, method, settings.tiny), name, settings.batch)
    measured.run()
    resident = resident_peak() - libraries
    return measured.count(), resident, trained_without_head(measured.model)


def applicable(name: str, settings: Settings) -> list[str]:
    """The methods that go into the backbone, in the order of `ADAPTERS`."""
    found = []
    for method in settings.methods or [method for method in ADAPTERS if method not in SKIPPED]:
        try:
            with_method(name, method, tiny=True)
            found.append(method)
        except ValueError as error:
            print(f"{method} is left out on {name}: {error}")
    return found


def run(settings: Settings) -> tuple[str, dict[str, Any]]:
    """Measure -> the page and the raw numbers, with the rows of earlier runs that were not measured now.

    Each row is written when it is measured: a run that is stopped keeps what it has.

    Raises:
        ValueError: the raw numbers in the output folder are none of these.
    """
    rows = Rows(settings.output / "adapters.json")
    speed = bfloat16_speed()
    this_run = described(settings) | {"bfloat16": speed}
    measures = {"methods": methods, "full": against_full, "peft": against_peft, "merged": merged_against_stock}
    for part, precision in product(settings.parts, settings.precisions):
        if part == "methods" and precision != "float32":
            continue
        if precision == "bfloat16" and speed < TOO_SLOW:
            print(f"{part} is left out in bfloat16, which has {speed:.2f} of float32's speed here")
            continue
        for row in measures[part](getattr(torch, precision), settings):
            rows.add(this_run, {"part": part, "precision": precision, **row})
            settings.write("adapters", page(rows), rows.raw())
    return page(rows), rows.raw()


def methods(precision: torch.dtype, settings: Settings) -> Iterator[dict[str, Any]]:
    """What each method costs, over full fine-tuning, on the backbones with a table of all."""
    for name in of_paper(settings):
        rows = []
        found = [PEFT, *applicable(name, settings)]
        for method in tqdm(["full", *found], desc=f"{name}: count", unit="method"):
            exact, resident, trained = in_fresh_process(account, name, method, settings)
            counts = asdict(exact) | {"resident_bytes": resident}
            row = {"backbone": name, "method": method, "batch": settings.batch, "trained": trained}
            rows.append(row | {"counts": counts})
        with tqdm(total=len(found) * (settings.few_pairs + WARM_UP), desc=f"{name}: time", unit="pair") as bar:
            for row in rows:
                bar.set_postfix_str(row["method"])
                ratios = []
                if row["method"] != "full":
                    ratios = over_full(name, row["method"], precision, settings.few_pairs, settings, bar.update)
                yield {**row, "time_ratios": ratios}


def against_full(precision: torch.dtype, settings: Settings) -> Iterator[dict[str, Any]]:
    """LoRA against full fine-tuning, on the same backbones."""
    for name in of_paper(settings):
        with tqdm(total=settings.pairs + WARM_UP, desc=f"{name}: LoRA / full, {precision}", unit="pair") as bar:
            ratios = over_full(name, "lora", precision, settings.pairs, settings, bar.update)
        yield {"backbone": name, "batch": settings.batch, "time_ratios": ratios}


def over_full(
    name: str, method: str, precision: torch.dtype, pairs: int, settings: Settings, progress: Callable[[], object]
) -> list[float]:
    """Ratios of the time of paired steps: a method's over full fine-tuning's, as the trainer runs both."""
    gc.collect()
    one, full = (
        step(with_method(name, which, settings.tiny), name, settings.batch, precision, keep_casts=which != PEFT)
        for which in (method, "full")
    )
    return paired_ratios(full.run, one.run, pairs, warm_up=WARM_UP, progress=progress)


def of_paper(settings: Settings) -> list[str]:
    return [name for name in OF_PAPER if name in settings.backbones]


def against_peft(precision: torch.dtype, settings: Settings) -> Iterator[dict[str, Any]]:
    """Our LoRA against PEFT's on all pairs of layers, with the paper's batch and the small one."""
    plan = [pair for pair in PAIRS if pair.backbone in settings.backbones]
    plan = [pair for pair in plan if settings.layers in ((), pair.targets)]
    for pair, batch in product(plan, settings.batches):
        yield one_against_peft(pair, precision, batch, settings)


def one_against_peft(pair: Pair, precision: torch.dtype, batch: str, settings: Settings) -> dict[str, Any]:
    """Our LoRA over PEFT's: ratios of the time of steps in rounds, bytes at the peak and trained parameters of both.

    Ours as the trainer runs it, and in bfloat16 the adapter alone; and a step without LoRA: what it could save at most.
    Where ours trains more parameters and takes more bytes, the bytes of PEFT's with a rank that trains as many.
    """
    gc.collect()
    size, rounds = {
        "paper": (settings.paper_batch, settings.paper_rounds),
        "small": (settings.batch, settings.small_rounds),
    }[batch]
    low = precision == torch.bfloat16

    def made(make: Callable[[Pair, bool], nn.Module], keep_casts: bool = False) -> Step:
        return step(make(pair, settings.tiny), pair.backbone, size, precision, keep_casts)

    theirs, ours = made(with_peft), made(with_lora, keep_casts=low)
    steps = {"time_ratios": ours, "without_lora": made(without_lora)} | (
        {"adapter_alone": made(with_lora)} if low else {}
    )
    described = f"{pair.backbone} {' '.join(pair.targets)}: {precision}, batch {size}"
    with tqdm(total=rounds + WARM_UP, desc=described, unit="round") as bar:
        runs = [each.run for each in steps.values()]
        ratios = round_ratios(theirs.run, runs, rounds, warm_up=WARM_UP, progress=bar.update)
    peaks = [each.count().peak_bytes for each in (ours, theirs)]
    trained = [trained_without_head(each.model) for each in (ours, theirs)]
    row: dict[str, Any] = {
        "backbone": pair.backbone,
        "layers": pair.targets,
        "batch": size,
        **dict(zip(steps, ratios, strict=True)),
        "peak_bytes": peaks,
        "trained": trained,
    }
    if peaks[0] > peaks[1] and trained[0] > trained[1]:
        rank = round(RANK * trained[0] / trained[1])
        wider = made(lambda pair, tiny: with_peft(pair, tiny, rank))
        bytes_of_wider, trained_of_wider = wider.count().peak_bytes, trained_without_head(wider.model)
        row["wider_peft"] = {"rank": rank, "trained": trained_of_wider, "peak_bytes": bytes_of_wider}
    return row


def merged_against_stock(precision: torch.dtype, settings: Settings) -> Iterator[dict[str, Any]]:
    """Merged models against stock ones, on the same backbones."""
    for name in of_paper(settings):
        yield one_merged_against_stock(name, precision, settings)


@torch.no_grad()
def one_merged_against_stock(name: str, precision: torch.dtype, settings: Settings) -> dict[str, Any]:
    """Ratios of the time of a merged model's forward pass over that of the stock model.

    Both frozen: within its context autocast keeps the copies of weights that train, but of no others.
    """
    stock = backbone(name, settings.tiny).eval().requires_grad_(False)
    merged = merge(inject(copy.deepcopy(stock), LoRA(rank=8))).requires_grad_(False)
    inputs = batch_of(name, settings.batch)
    forward: list[Callable[[], object]] = [partial(model, *inputs) for model in (stock, merged)]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == torch.bfloat16):
        ratios = paired_ratios(*forward, settings.merged_pairs, warm_up=WARM_UP)
    return {"backbone": name, "batch": settings.batch, "time_ratios": ratios}


def bfloat16_speed() -> float:
    """How many times faster a product of the size of ViT-B's is in bfloat16 than in float32 here."""
    seconds = []
    for dtype in (torch.float32, torch.bfloat16):
        left, right = torch.randn(256, 768).to(dtype), torch.randn(768, 768).to(dtype)
        times = []
        for _ in range(5):
            start = perf_counter()
            left @ right
            times.append(perf_counter() - start)
        seconds.append(min(times))
    return seconds[0] / seconds[1]

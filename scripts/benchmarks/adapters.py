"""What a training step of each adapter costs, against full fine-tuning and against PEFT's LoRA, on this machine."""

from __future__ import annotations

import copy
import gc
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from time import perf_counter
from typing import Any

import torch
from tqdm import tqdm

from adapters import ADAPTERS, LoRA, inject, merge
from benchmarks.adapted_models import (
    BACKBONES,
    OF_PAPER,
    PAIRS,
    PEFT,
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
from benchmarks.machine import described, in_fresh_process
from benchmarks.measure import Counts, paired_ratios, resident_peak
from benchmarks.options import Options, option

PARTS = ("methods", "full", "peft", "merged")
PRECISIONS = ("float32", "bfloat16")
WARM_UP = 2
TOO_SLOW = 0.2  # of float32's speed: a processor without units for bfloat16 would take hours
SKIPPED = {"full", "linear", "partial"}  # full is the reference; the others train parts of it


@dataclass(frozen=True, kw_only=True)
class Settings(Options):
    """What is run: all methods (in float32), LoRA against full fine-tuning and PEFT's, and merged models."""

    parts: tuple[str, ...] = option(PARTS, "what is measured; what is not stays as --output has it", choices=PARTS)
    precisions: tuple[str, ...] = option(PRECISIONS, "in which precisions, likewise", choices=PRECISIONS)
    backbones: tuple[str, ...] = option(BACKBONES, "what is adapted", choices=BACKBONES)
    methods: tuple[str, ...] = option((), "rows; all that go into the backbone by default")
    batch: int = option(4, "images in a step, and a quarter of its sentences")
    pairs: int = option(15, "pairs of steps for LoRA against full fine-tuning")
    few_pairs: int = option(5, "pairs of steps for the other rows")
    paper_batch: int = option(32, "images in a step for LoRA against PEFT's: the paper's batch")
    paper_pairs: int = option(12, "pairs of these steps")
    small_pairs: int = option(24, "pairs of the same with the small batch")
    merged_pairs: int = option(60, "pairs of a merged model's forward passes")
    tiny: bool = option(False, "two blocks of each backbone, to try it out")

    def __post_init__(self) -> None:
        super().__post_init__()
        if unknown := set(self.methods) - set(ADAPTERS):
            raise ValueError(f"unknown adapter {min(unknown)!r}; choose from {', '.join(ADAPTERS)}")


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
    """Measure -> the page and the raw numbers: part -> precision -> its rows and what they were measured with.

    Raises:
        ValueError: the raw numbers in the output folder are none of these.
    """
    results = last_run(settings)
    speed = bfloat16_speed()
    conditions = described(settings) | {"bfloat16": speed}
    measures = {"methods": methods, "full": against_full, "peft": against_peft, "merged": merged_against_stock}
    for part, precision in product(settings.parts, settings.precisions):
        if part == "methods" and precision != "float32":
            continue
        if precision == "bfloat16" and speed < TOO_SLOW:
            print(f"{part} is left out in bfloat16, which has {speed:.2f} of float32's speed here")
            continue
        rows = measures[part](getattr(torch, precision), settings)
        results.setdefault(part, {})[precision] = conditions | {"rows": rows}
    return page(results), results


def last_run(settings: Settings) -> dict[str, dict[str, Any]]:
    """What the output folder has."""
    path = settings.output / "adapters.json"
    if not path.is_file():
        return {}
    found: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    if not (found.keys() <= set(PARTS) and all(each.keys() <= set(PRECISIONS) for each in found.values())):
        raise ValueError(f"{path} is not laid out as part, precision, rows: remove it or choose another --output")
    return found


def methods(precision: torch.dtype, settings: Settings) -> list[dict[str, Any]]:
    """What each method costs, over full fine-tuning, on the backbones with a table of all."""
    rows = []
    for name in of_paper(settings):
        found = [PEFT, *applicable(name, settings)]
        for method in tqdm(["full", *found], desc=f"{name}: count", unit="method"):
            exact, resident, trained = in_fresh_process(account, name, method, settings)
            counts = asdict(exact) | {"resident_bytes": resident}
            rows.append({"backbone": name, "method": method, "trained": trained, "counts": counts, "time_ratios": []})
        with tqdm(total=len(found) * (settings.few_pairs + WARM_UP), desc=f"{name}: time", unit="pair") as bar:
            for row in rows[-len(found) :]:
                bar.set_postfix_str(row["method"])
                row["time_ratios"] = over_full(name, row["method"], precision, settings.few_pairs, settings, bar.update)
    return rows


def against_full(precision: torch.dtype, settings: Settings) -> list[dict[str, Any]]:
    """LoRA against full fine-tuning, on the same backbones."""
    rows = []
    for name in of_paper(settings):
        with tqdm(total=settings.pairs + WARM_UP, desc=f"{name}: LoRA / full, {precision}", unit="pair") as bar:
            ratios = over_full(name, "lora", precision, settings.pairs, settings, bar.update)
        rows.append(_row(name, precision) | {"batch": settings.batch, "time_ratios": ratios})
    return rows


def over_full(
    name: str, method: str, precision: torch.dtype, pairs: int, settings: Settings, progress: Callable[[], object]
) -> list[float]:
    """Ratios of the time of paired steps: a method's over full fine-tuning's."""
    gc.collect()
    one, full = (
        step(with_method(name, which, settings.tiny), name, settings.batch, precision) for which in (method, "full")
    )
    return paired_ratios(full.run, one.run, pairs, warm_up=WARM_UP, progress=progress)


def of_paper(settings: Settings) -> list[str]:
    return [name for name in OF_PAPER if name in settings.backbones]


def against_peft(precision: torch.dtype, settings: Settings) -> list[dict[str, Any]]:
    """Our LoRA against PEFT's on all pairs of layers, with the paper's batch and the small one."""
    plan = [pair for pair in PAIRS if pair.backbone in settings.backbones]
    batches = (settings.paper_batch, settings.batch)
    return [one_against_peft(pair, precision, batch, settings) for pair, batch in product(plan, batches)]


def one_against_peft(pair: Pair, precision: torch.dtype, batch: int, settings: Settings) -> dict[str, Any]:
    """Our LoRA over PEFT's: ratios of the time of paired steps, bytes at the peak and trained parameters of both.

    With the small batch also a step without LoRA over PEFT's: what could be saved at most.
    """
    gc.collect()
    small = batch == settings.batch
    pairs = settings.small_pairs if small else settings.paper_pairs
    models = with_lora(pair, settings.tiny), with_peft(pair, settings.tiny)
    ours, theirs = (step(model, pair.backbone, batch, precision) for model in models)
    without: list[float] = []
    described = f"{pair.backbone} {' '.join(pair.targets)}: {precision}, batch {batch}"
    with tqdm(total=(pairs + WARM_UP) * (1 + small), desc=described, unit="pair") as bar:
        measure = partial(paired_ratios, theirs.run, pairs=pairs, warm_up=WARM_UP, progress=bar.update)
        ratios = measure(ours.run)
        if small:
            without = measure(step(without_lora(pair, settings.tiny), pair.backbone, batch, precision).run)
    return _row(pair.backbone, precision) | {
        "layers": pair.targets,
        "batch": batch,
        "time_ratios": ratios,
        "without_lora": without,
        "peak_bytes": [each.count().peak_bytes for each in (ours, theirs)],
        "trained": [trained_without_head(model) for model in models],
    }


def merged_against_stock(precision: torch.dtype, settings: Settings) -> list[dict[str, Any]]:
    """Merged models against stock ones, on the same backbones."""
    return [one_merged_against_stock(name, precision, settings) for name in of_paper(settings)]


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
    return _row(name, precision) | {"batch": settings.batch, "time_ratios": ratios}


def _row(name: str, precision: torch.dtype) -> dict[str, Any]:
    return {"backbone": name, "precision": str(precision).removeprefix("torch.")}


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

"""Table 6 of the ReSoRA paper on this machine: what each regularizer adds to a training step of ViT-B/16."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from dataclasses import asdict, astuple, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.machine import described, in_fresh_process
from benchmarks.measure import count, paired_ratios
from benchmarks.naive_equations import NAIVE
from benchmarks.options import Options, option
from benchmarks.regularizers_page import page
from benchmarks.training_step import TrainingStep, account, penalty
from regularizers import REGULARIZERS

FEW_PAIRS = 5  # for the equations as printed: slow, and far enough from 1
WARM_UP = 2


@dataclass(frozen=True, kw_only=True)
class Settings(Options):
    """What is run."""

    batch: int = option(4, "images in a step; N = 197 samples each at 224 px")
    naive_batch: int = option(1, "images in a step with an equation as printed, for its memory")
    pairs: int = option(15, "steps with and without the penalty, for each row")
    model: str = option("vit_base_patch16_224", "a timm ViT")
    image_size: int = option(224, "pixels")
    measures: tuple[str, ...] = option(tuple(REGULARIZERS), "rows", choices=tuple(REGULARIZERS))
    samples: tuple[int, ...] = option((1576, 6304, 25216), "of the nonlinear measure on its own")
    add: bool = option(False, "add pairs to LoRA's rows of the last run in --output, where their times are not decided")

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.samples) < 2:
            raise ValueError(f"samples are {self.samples}; expected at least 2 each")


@dataclass(frozen=True)
class Row:
    """One training step: an adapter, a penalty ("" none, "linear" a closed form, "Eq. 7" as printed), images."""

    adapter: str
    penalty: str
    batch: int

    @property
    def reference(self) -> Row:
        """What its costs are divided by: its adapter without a penalty; LoRA for full fine-tuning."""
        return Row("lora" if self.adapter == "full" else self.adapter, "", self.batch)

    @property
    def label(self) -> str:
        adapter = {"full": "Full", "lora": "LoRA", "dtl": "DTL"}[self.adapter]
        return f"{adapter} + {self.penalty}" if self.penalty else adapter


def rows(settings: Settings) -> list[Row]:
    """The rows of the table, each reference before what refers to it."""
    measures = settings.measures
    found = [Row("full", "", settings.batch), Row("lora", "", settings.batch)]
    found += [Row("lora", measure, settings.batch) for measure in measures]
    found += [Row("dtl", "", settings.batch)]
    found += [Row("dtl", measure, settings.batch) for measure in measures]
    printed = [NAIVE[measure][0] for measure in measures if measure in NAIVE]
    return found + [row for name in ["", *printed] if (row := Row("lora", name, settings.naive_batch)) not in found]


def run(settings: Settings) -> tuple[str, dict[str, Any]]:
    """Measure -> the page and the raw numbers."""
    if settings.add:
        return add_pairs(settings)
    table = rows(settings)
    repeats = {"few_pairs": min(FEW_PAIRS, settings.pairs), "warm_up": WARM_UP}
    results: dict[str, Any] = {"settings": described(settings) | repeats, "rows": [], "growth": []}
    options = (settings.model, settings.image_size, settings.threads)
    counts = {row: in_fresh_process(account, astuple(row), *options) for row in tqdm(table, desc="count", unit="row")}
    ratios = time_rows(table, settings)
    for row in table:
        exact, resident = counts[row]
        exact_reference, resident_reference = counts[row.reference]
        results["rows"].append(
            {
                **asdict(row),
                "label": row.label,
                "counts": asdict(exact) | {"resident_bytes": resident},
                "reference": asdict(exact_reference) | {"resident_bytes": resident_reference},
                "time_ratios": ratios.get(row, []),
            }
        )
    results["growth"] = growth(settings)
    return page(results), results


def add_pairs(settings: Settings) -> tuple[str, dict[str, Any]]:
    """More pairs for LoRA's rows of what `run` wrote on the same machine; all else stays.

    Raises:
        ValueError: there is nothing to add to, or it was measured in another way.
    """
    path = settings.output / "regularizers.json"
    if not path.is_file():
        raise ValueError(f"{path} does not exist: there is no run to add pairs to; run without --add first")
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    now = described(settings)
    for name in ("threads", "batch", "model", "image_size", "processor", "torch"):
        if results["settings"][name] != now[name]:
            raise ValueError(
                f"{path} has {name} {results['settings'][name]!r}, but this run {now[name]!r}: not the same"
            )
    ratios = time_rows([Row("lora", measure, settings.batch) for measure in settings.measures], settings)
    for row in results["rows"]:
        row["time_ratios"] += ratios.get(Row(row["adapter"], row["penalty"], row["batch"]), [])
    measures = ", ".join(settings.measures)
    results["settings"]["added"] = results["settings"].get("added", "") + (
        f" `{now['command']}` added {settings.pairs} pairs to LoRA with {measures} on {now['date']}."
    )
    return page(results), results


def time_rows(table: list[Row], settings: Settings) -> dict[Row, list[float]]:
    """For each row with a penalty, the ratios of paired steps: with the penalty over without, same model and batch."""
    timed = [row for row in table if row.penalty]
    pairs = {
        row: min(settings.pairs, FEW_PAIRS) if row.penalty not in REGULARIZERS else settings.pairs for row in timed
    }
    ratios: dict[Row, list[float]] = {}
    with tqdm(total=sum(pairs.values()) + WARM_UP * len(timed), desc="time", unit="pair") as bar:
        for reference in dict.fromkeys(row.reference for row in timed):
            step = TrainingStep(reference.adapter, reference.batch, settings.model, settings.image_size)
            for row in [row for row in timed if row.reference == reference]:
                bar.set_postfix_str(row.label)
                gc.collect()
                penalised = partial(step.run, penalty(row.penalty))
                ratios[row] = paired_ratios(step.run, penalised, pairs[row], warm_up=WARM_UP, progress=bar.update)
    return ratios


def growth(settings: Settings, rank: int = 8, width: int = 768) -> list[dict[str, Any]]:
    """The nonlinear measure, value and gradient, against the number of samples; Eq. 8 as printed at the smallest."""
    sizes = sorted(settings.samples)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(sizes[-1], rank, generator=generator)
    basis = torch.randn(rank, width, generator=generator)
    printed, equation_8 = NAIVE["nonlinear"]
    forms = [("nonlinear", REGULARIZERS["nonlinear"], size) for size in sizes] + [(printed, equation_8, sizes[0])]

    def evaluate(function: Callable[..., Tensor], samples: Tensor) -> None:
        torch.autograd.grad(function(samples, basis), samples)

    found: list[dict[str, Any]] = []
    for form, function, size in tqdm(forms, desc="growth", unit="size"):
        smallest, samples = (drawn[:length].clone().requires_grad_() for length in (sizes[0], size))
        counts = count(
            partial(function, samples, basis), partial(torch.autograd.grad, inputs=samples), alive=[samples, basis]
        )
        times = []
        if found:  # all but the first, which is what they are relative to
            pairs = settings.pairs if form == "nonlinear" else min(settings.pairs, FEW_PAIRS)
            first = partial(evaluate, REGULARIZERS["nonlinear"], smallest)
            times = paired_ratios(first, partial(evaluate, function, samples), pairs, warm_up=WARM_UP)
        found.append({"form": form, "samples": size, "counts": asdict(counts), "time_ratios": times})
    return found

"""What a training step of each adapter costs, against full fine-tuning and against PEFT's LoRA, on this machine."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from time import perf_counter
from typing import Any

import peft
import timm
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import BertConfig, BertModel

from adapters import ADAPTERS, Adapter, LoRA, inject, merge, trainable_parameters
from benchmarks.adapters_page import page
from benchmarks.machine import described, in_fresh_process
from benchmarks.measure import Counts, count, paired_ratios, resident_peak
from benchmarks.options import Options, option
from benchmarks.training_step import Step

WARM_UP = 2
# PEFT adapts timm's fused qkv with one pair of factors, ours with three, which at rank 8 are as many parameters as its
# rank 12; on o, fc1 and fc2 both do the same.
PEFT, PEFT_EQUAL = "PEFT's LoRA", "PEFT's LoRA, rank 12"
SAME, PEFT_SAME = "lora on o, fc1, fc2", "PEFT's LoRA on o, fc1, fc2"
# backbone -> row -> rank and modules
PEFT_LORA: dict[str, dict[str, tuple[int, list[str]]]] = {
    "vit": {PEFT: (8, ["qkv"]), PEFT_EQUAL: (12, ["qkv"]), PEFT_SAME: (8, ["attn.proj", "fc1", "fc2"])},
    "bert": {PEFT: (8, ["query", "value"])},
}
# backbone -> our row -> the rows of PEFT's that it is compared with
AGAINST_PEFT: dict[str, dict[str, tuple[str, ...]]] = {
    "vit": {"lora": (PEFT, PEFT_EQUAL), SAME: (PEFT_SAME,)},
    "bert": {"lora": (PEFT,)},
}
CLASSES = 100
TOO_SLOW = 0.2  # of float32's speed: a processor without units for bfloat16 would take hours
# Settings of the paper's Tables 1 and 2; what is not named has its defaults.
OF_PAPER: dict[str, dict[str, Any]] = {
    "vit": {
        **{name: {"rank": 8, "targets": ("q", "k", "v")} for name in ("lora", "moslora", "adalora")},
        "adaptformer": {"bottleneck": 8},
        "lst": {"reduction": 8},
    },
    "bert": {"lst": {"reduction": 4}},
}
SKIPPED = {"full", "linear", "partial"}  # full is the reference; the others train parts of it


@dataclass(frozen=True, kw_only=True)
class Settings(Options):
    """What is run."""

    backbones: tuple[str, ...] = option(("vit", "bert"), "what is adapted", choices=("vit", "bert"))
    methods: tuple[str, ...] = option((), "rows; all that go into the backbone by default")
    batch: int = option(4, "images in a step, and a quarter of its sentences")
    pairs: int = option(15, "pairs of steps for LoRA")
    peft_pairs: int = option(120, "pairs of steps for LoRA against PEFT's")
    large_batch: int = option(32, "images of a larger step of LoRA's and PEFT's")
    large_pairs: int = option(20, "pairs of these larger steps")
    few_pairs: int = option(5, "pairs of steps for the other rows")
    tiny: bool = option(False, "two blocks of each backbone, to try it out")

    def __post_init__(self) -> None:
        super().__post_init__()
        if unknown := set(self.methods) - set(ADAPTERS):
            raise ValueError(f"unknown adapter {min(unknown)!r}; choose from {', '.join(ADAPTERS)}")


class BertClassifier(nn.Module):
    """BERT and a linear head on the first token."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.bert = BertModel(config, add_pooling_layer=False)
        self.head = nn.Linear(config.hidden_size, CLASSES)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.bert(input_ids=ids, attention_mask=mask).last_hidden_state[:, 0])


def backbone(name: str, tiny: bool) -> nn.Module:
    """ViT-B/16 at 224 px or BERT-base with random weights; `tiny` keeps two blocks."""
    torch.manual_seed(0)
    depth: dict[str, Any] = {"depth" if name == "vit" else "num_hidden_layers": 2} if tiny else {}
    if name == "vit":
        return timm.create_model("vit_base_patch16_224", num_classes=CLASSES, **depth)
    return BertClassifier(BertConfig(**depth))


def batch_of(name: str, size: int) -> tuple[Tensor, ...]:
    """`size` images, or four times as many sentences of 32 tokens."""
    if name == "vit":
        return (torch.randn(size, 3, 224, 224),)
    return torch.randint(1000, 30000, (4 * size, 32)), torch.ones(4 * size, 32, dtype=torch.long)


def with_method(name: str, method: str, tiny: bool) -> nn.Module:
    """The backbone with an adapter, ours or PEFT's LoRA, and its head trained."""
    model = backbone(name, tiny)
    if method not in PEFT_LORA[name]:
        return inject(model, configured(name, method), train=("head",))
    rank, layers = PEFT_LORA[name][method]
    wrapped: Any = peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=layers))
    wrapped.base_model.model.head.requires_grad_(True)
    return wrapped


def configured(name: str, method: str) -> Adapter:
    if method == SAME:
        return LoRA(rank=8, targets=("o", "fc1", "fc2"))
    return ADAPTERS[method](**OF_PAPER[name].get(method, {}))


def step(name: str, method: str, settings: Settings, precision: torch.dtype = torch.float32) -> Step:
    model = with_method(name, method, settings.tiny)
    torch.manual_seed(1)
    inputs = batch_of(name, settings.batch)
    return Step(model, inputs, torch.randint(CLASSES, (len(inputs[0]),)), precision)


def account(name: str, method: str, settings: Settings) -> tuple[Counts, int, int]:
    """Counts of one step, resident bytes at its peak, trained parameters without the head. In a fresh process."""
    torch.set_num_threads(settings.threads)
    libraries = resident_peak()
    measured = step(name, method, settings)
    measured.run()
    resident = resident_peak() - libraries
    head = 768 * CLASSES + CLASSES
    trained = trainable_parameters(measured.model) - head
    return count(measured.loss, measured.update, measured.tensors()), resident, trained


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
    """Measure -> the page and the raw numbers."""
    results: dict[str, Any] = {"settings": described(settings), "rows": [], "large": [], "merged": []}
    results["bfloat16"] = bfloat16_speed()
    for name in settings.backbones:
        methods = applicable(name, settings)
        pairs = against_peft(name, methods)
        rows = dict.fromkeys(["full", PEFT, *methods, *(row for pair in pairs for row in pair)])
        counts = {
            method: in_fresh_process(account, name, method, settings)
            for method in tqdm(rows, desc=f"{name}: count", unit="method")
        }
        times = timed(name, methods, settings)
        for method, (exact, resident, trained) in counts.items():
            theirs = [reference for ours, reference in pairs if ours == method]
            results["rows"].append(
                {
                    "backbone": name,
                    "method": method,
                    "trained": trained,
                    "counts": asdict(exact) | {"resident_bytes": resident},
                    "against_full": times.get(("full", method), []),
                    "against_peft": {each: times[each, method] for each in theirs},
                    "against_full_bfloat16": times.get(("full bfloat16", method), []),
                    "against_peft_bfloat16": {each: times.get((f"{each} bfloat16", method), []) for each in theirs},
                }
            )
        larger = replace(settings, batch=settings.large_batch)
        results["large"] += [large(name, *pair, larger) for pair in pairs]
        results["merged"].append({"backbone": name, "time_ratios": merged_against_stock(name, settings)})
    return page(results), results


def against_peft(name: str, methods: list[str]) -> list[tuple[str, str]]:
    """Our LoRA and PEFT's that it is compared with."""
    rows = AGAINST_PEFT[name] if "lora" in methods else {}
    return [(ours, theirs) for ours, references in rows.items() for theirs in references]


def timed(name: str, methods: list[str], settings: Settings) -> dict[tuple[str, str], list[float]]:
    """(reference, method) -> ratios of paired steps; LoRA also against PEFT's, and under bfloat16 autocast."""
    plan: list[tuple[str, str, int, torch.dtype]] = [("full", PEFT, settings.few_pairs, torch.float32)]
    for method in methods:
        plan.append(("full", method, settings.pairs if method == "lora" else settings.few_pairs, torch.float32))
    slow = bfloat16_speed() < TOO_SLOW
    for ours, theirs in against_peft(name, methods):
        plan.append((theirs, ours, settings.peft_pairs, torch.float32))
        if not slow:
            plan.append((theirs, ours, settings.pairs, torch.bfloat16))
    if "lora" in methods and not slow:
        plan.append(("full", "lora", settings.few_pairs, torch.bfloat16))
    ratios: dict[tuple[str, str], list[float]] = {}
    total = sum(pairs + WARM_UP for _, _, pairs, _ in plan)
    with tqdm(total=total, desc=f"{name}: time", unit="pair") as bar:
        for reference, method, pairs, precision in plan:
            bar.set_postfix_str(f"{method} / {reference}")
            gc.collect()
            one, other = (step(name, which, settings, precision) for which in (method, reference))
            key = reference if precision == torch.float32 else f"{reference} bfloat16"
            ratios[key, method] = paired_ratios(other.run, one.run, pairs, warm_up=WARM_UP, progress=bar.update)
    return ratios


def large(name: str, ours: str, theirs: str, settings: Settings) -> dict[str, Any]:
    """LoRA against PEFT's with a larger batch, whose tensors are not in the cache any more."""
    counts = [in_fresh_process(account, name, row, settings)[0] for row in (ours, theirs)]
    found: dict[str, Any] = {
        "backbone": name,
        "method": ours,
        "reference": theirs,
        "peak_bytes": [each.peak_bytes for each in counts],
    }
    slow = bfloat16_speed() < TOO_SLOW
    for precision in (torch.float32,) if slow else (torch.float32, torch.bfloat16):
        gc.collect()
        one, other = (step(name, row, settings, precision) for row in (ours, theirs))
        with tqdm(total=settings.large_pairs + WARM_UP, desc=f"{name}: {ours}, large batch", unit="pair") as bar:
            ratios = paired_ratios(other.run, one.run, settings.large_pairs, warm_up=WARM_UP, progress=bar.update)
        found[str(precision).removeprefix("torch.")] = ratios
    return found


@torch.no_grad()
def merged_against_stock(name: str, settings: Settings) -> list[float]:
    """Time of a merged model's forward pass over that of the stock model."""
    stock = backbone(name, settings.tiny).eval()
    targets = ("q", "k", "v") if name == "vit" else ("q", "v")
    merged = merge(inject(copy.deepcopy(stock), LoRA(rank=8, targets=targets), train=("head",)))
    inputs = batch_of(name, settings.batch)
    forward: list[Callable[[], object]] = [partial(model, *inputs) for model in (stock, merged)]
    return paired_ratios(*forward, settings.pairs, warm_up=WARM_UP)


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

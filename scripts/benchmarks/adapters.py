"""What a training step of each adapter costs, against full fine-tuning and against PEFT's LoRA, on this machine."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from time import perf_counter
from typing import Any, NamedTuple, cast

import peft
import timm
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

from adapters import ADAPTERS, LoRA, inject, merge, trainable_parameters
from benchmarks.adapters_page import page
from benchmarks.machine import described, in_fresh_process
from benchmarks.measure import Counts, paired_ratios, resident_peak
from benchmarks.options import Options, option
from benchmarks.training_step import Step

WARM_UP = 2
PEFT = "PEFT's LoRA"
BACKBONES = ("vit", "vit_transformers", "bert")
CLASSES = 100
TOO_SLOW = 0.2  # of float32's speed: a processor without units for bfloat16 would take hours
# Backbones with a table of all methods: settings of the paper's Tables 1 and 2; what is not named has its defaults.
OF_PAPER: dict[str, dict[str, Any]] = {
    "vit": {
        **{name: {"rank": 8, "targets": ("q", "k", "v")} for name in ("lora", "moslora", "adalora")},
        "adaptformer": {"bottleneck": 8},
        "lst": {"reduction": 8},
    },
    "bert": {"lst": {"reduction": 4}},
}
SKIPPED = {"full", "linear", "partial"}  # full is the reference; the others train parts of it


class Pair(NamedTuple):
    """Our LoRA and PEFT's, of rank 8, on the same layers of a backbone."""

    backbone: str
    targets: tuple[str, ...]
    """Of ours."""
    modules: tuple[str, ...]
    """Of PEFT's."""


PAIRS = (
    Pair("vit", ("q", "k", "v"), ("qkv",)),
    Pair("vit", ("o", "fc1", "fc2"), ("attn.proj", "fc1", "fc2")),
    Pair("vit_transformers", ("q", "k", "v"), ("q_proj", "k_proj", "v_proj")),
    Pair("bert", ("q", "v"), ("query", "value")),
)


@dataclass(frozen=True, kw_only=True)
class Settings(Options):
    """What is run."""

    backbones: tuple[str, ...] = option(BACKBONES, "what is adapted", choices=BACKBONES)
    methods: tuple[str, ...] = option((), "rows; all that go into the backbone by default")
    batch: int = option(4, "images in a step, and a quarter of its sentences")
    pairs: int = option(15, "pairs of steps for LoRA against full fine-tuning")
    few_pairs: int = option(5, "pairs of steps for the other rows")
    paper_batch: int = option(32, "images in a step for LoRA against PEFT's: the paper's batch")
    paper_pairs: int = option(7, "pairs of these steps in float32")
    small_pairs: int = option(12, "pairs of the same with the small batch")
    bfloat16_factor: int = option(4, "times as many pairs of these two in bfloat16, whose steps are shorter")
    merged_pairs: int = option(60, "pairs of a merged model's forward passes")
    tiny: bool = option(False, "two blocks of each backbone, to try it out")

    def __post_init__(self) -> None:
        super().__post_init__()
        if unknown := set(self.methods) - set(ADAPTERS):
            raise ValueError(f"unknown adapter {min(unknown)!r}; choose from {', '.join(ADAPTERS)}")


class Classifier(nn.Module):
    """An encoder of transformers and a linear head on the first token."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(768, CLASSES)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.head(self.encoder(*inputs).last_hidden_state[:, 0])


def backbone(name: str, tiny: bool) -> nn.Module:
    """ViT-B/16 at 224 px, of timm or transformers, or BERT-base, with random weights; `tiny` keeps two blocks."""
    torch.manual_seed(0)
    depth: dict[str, Any] = {"depth" if name == "vit" else "num_hidden_layers": 2} if tiny else {}
    if name == "vit":
        return timm.create_model("vit_base_patch16_224", num_classes=CLASSES, **depth)
    if name == "vit_transformers":
        return Classifier(ViTModel(ViTConfig(**depth), add_pooling_layer=False))
    return Classifier(BertModel(BertConfig(**depth), add_pooling_layer=False))


def batch_of(name: str, size: int) -> tuple[Tensor, ...]:
    """`size` images, or four times as many sentences of 32 tokens."""
    if name != "bert":
        return (torch.randn(size, 3, 224, 224),)
    return torch.randint(1000, 30000, (4 * size, 32)), torch.ones(4 * size, 32, dtype=torch.long)


def with_method(name: str, method: str, tiny: bool) -> nn.Module:
    """The backbone with an adapter or PEFT's LoRA (of its first pair), and its head trained."""
    if method == PEFT:
        return with_peft(next(pair for pair in PAIRS if pair.backbone == name), tiny)
    return inject(backbone(name, tiny), ADAPTERS[method](**OF_PAPER[name].get(method, {})), train=("head",))


def with_lora(pair: Pair, tiny: bool) -> nn.Module:
    return inject(backbone(pair.backbone, tiny), LoRA(rank=8, targets=pair.targets), train=("head",))


def with_peft(pair: Pair, tiny: bool) -> nn.Module:
    config = peft.LoraConfig(r=8, lora_alpha=8, target_modules=list(pair.modules))
    wrapped: Any = peft.get_peft_model(cast(Any, backbone(pair.backbone, tiny)), config)
    wrapped.base_model.model.head.requires_grad_(True)
    return wrapped


def without_lora(pair: Pair, tiny: bool) -> nn.Module:
    """The frozen backbone and its head, with the gradient through all that it passes through where LoRA is."""
    model = backbone(pair.backbone, tiny).requires_grad_(False)
    model.get_submodule("head").requires_grad_(True)
    for suffix in pair.modules:
        first = next(module for name, module in model.named_modules() if name.endswith(suffix))
        first.register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    return model


def step(model: nn.Module, name: str, batch: int, precision: torch.dtype = torch.float32) -> Step:
    torch.manual_seed(1)
    inputs = batch_of(name, batch)
    return Step(model, inputs, torch.randint(CLASSES, (len(inputs[0]),)), precision)


def trained_without_head(model: nn.Module) -> int:
    return trainable_parameters(model) - (768 * CLASSES + CLASSES)


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
    """Measure -> the page and the raw numbers."""
    results: dict[str, Any] = {"settings": described(settings), "rows": [], "against_peft": [], "merged": []}
    results["bfloat16"] = bfloat16_speed()
    precisions = [torch.float32] if results["bfloat16"] < TOO_SLOW else [torch.float32, torch.bfloat16]
    for name in (name for name in OF_PAPER if name in settings.backbones):
        methods = applicable(name, settings)
        counts = {
            method: in_fresh_process(account, name, method, settings)
            for method in tqdm(["full", PEFT, *methods], desc=f"{name}: count", unit="method")
        }
        times = against_full(name, [PEFT, *methods], precisions, settings)
        for method, (exact, resident, trained) in counts.items():
            results["rows"].append(
                {
                    "backbone": name,
                    "method": method,
                    "trained": trained,
                    "counts": asdict(exact) | {"resident_bytes": resident},
                    "against_full": times.get((method, torch.float32), []),
                    "against_full_bfloat16": times.get((method, torch.bfloat16), []),
                }
            )
        results["merged"] += [merged_against_stock(name, precision, settings) for precision in precisions]
    if not settings.methods or "lora" in settings.methods:
        plan = [pair for pair in PAIRS if pair.backbone in settings.backbones]
        for pair, precision, batch in product(plan, precisions, (settings.paper_batch, settings.batch)):
            results["against_peft"].append(against_peft(pair, precision, batch, settings))
    return page(results), results


def against_full(
    name: str, methods: list[str], precisions: list[torch.dtype], settings: Settings
) -> dict[tuple[str, torch.dtype], list[float]]:
    """Ratios of paired steps by method and precision; only LoRA is timed in bfloat16."""
    plan = [(method, precision) for precision in precisions for method in methods
            if method == "lora" or precision == torch.float32]  # fmt: skip
    pairs = {method: settings.pairs if method == "lora" else settings.few_pairs for method in methods}
    ratios = {}
    with tqdm(total=sum(pairs[method] + WARM_UP for method, _ in plan), desc=f"{name}: time", unit="pair") as bar:
        for method, precision in plan:
            bar.set_postfix_str(method)
            gc.collect()
            one, full = (
                step(with_method(name, which, settings.tiny), name, settings.batch, precision)
                for which in (method, "full")
            )
            ratios[method, precision] = paired_ratios(
                full.run, one.run, pairs[method], warm_up=WARM_UP, progress=bar.update
            )
    return ratios


def against_peft(pair: Pair, precision: torch.dtype, batch: int, settings: Settings) -> dict[str, Any]:
    """Our LoRA over PEFT's: ratios of the time of paired steps, bytes at the peak and trained parameters of both.

    With the small batch also a step without LoRA over PEFT's: what could be saved at most.
    """
    gc.collect()
    small = batch == settings.batch
    pairs = settings.small_pairs if small else settings.paper_pairs
    if precision == torch.bfloat16:
        pairs *= settings.bfloat16_factor
    models = with_lora(pair, settings.tiny), with_peft(pair, settings.tiny)
    ours, theirs = (step(model, pair.backbone, batch, precision) for model in models)
    without: list[float] = []
    described = f"{pair.backbone} {' '.join(pair.targets)}: {name_of(precision)}, batch {batch}"
    with tqdm(total=(pairs + WARM_UP) * (1 + small), desc=described, unit="pair") as bar:
        measure = partial(paired_ratios, theirs.run, pairs=pairs, warm_up=WARM_UP, progress=bar.update)
        ratios = measure(ours.run)
        if small:
            without = measure(step(without_lora(pair, settings.tiny), pair.backbone, batch, precision).run)
    return {
        "backbone": pair.backbone,
        "layers": pair.targets,
        "precision": name_of(precision),
        "batch": batch,
        "time_ratios": ratios,
        "without_lora": without,
        "peak_bytes": [each.count().peak_bytes for each in (ours, theirs)],
        "trained": [trained_without_head(model) for model in models],
    }


@torch.no_grad()
def merged_against_stock(name: str, precision: torch.dtype, settings: Settings) -> dict[str, Any]:
    """Ratios of the time of a merged model's forward pass over that of the stock model.

    Both frozen: within its context autocast keeps the copies of weights that train, but of no others.
    """
    stock = backbone(name, settings.tiny).eval().requires_grad_(False)
    merged = merge(inject(copy.deepcopy(stock), LoRA(rank=8))).requires_grad_(False)
    inputs = batch_of(name, settings.batch)
    forward: list[Callable[[], object]] = [partial(model, *inputs) for model in (stock, merged)]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == torch.bfloat16):
        ratios = paired_ratios(*forward, settings.merged_pairs, warm_up=WARM_UP)
    return {"backbone": name, "precision": name_of(precision), "time_ratios": ratios}


def name_of(precision: torch.dtype) -> str:
    return str(precision).removeprefix("torch.")


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

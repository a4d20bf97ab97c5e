"""The cells of the table in docs/adapters.md, methods by architectures, and small models for each."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from backbones import build, inputs
from torch import Tensor, nn
from torch.nn import functional as F

from adapters import ADAPTERS, Adapter, inject
from regularizers import capture

ARCHITECTURES = {"BERT": ("bert",), "CLIP": ("clip", "clip, own attention"), "ViT": ("vit",), "Swin": ("swin",),
                 "ConvNeXt": ("convnext",)}  # fmt: skip
# Sizes that suit the small models; the defaults are the papers'.
SETTINGS: dict[str, dict[str, Any]] = {
    **{name: {"rank": 3, "targets": ("q", "v", "fc1")} for name in ("lora", "moslora", "adalora")},
    **{name: {"rank": 3, "dropout": 0.0} for name in ("fact_tt", "fact_tk")},
    "houlsby": {"bottleneck": 4},
    "adaptformer": {"bottleneck": 4, "dropout": 0.0},
    "prefix": {"prompts": 3, "hidden": 8},
    "vpt": {"prompts": 2},
    "lst": {"reduction": 2},
    "unipt": {"dim": 8},
    "noah": {"prompts": (2, 0, 1), "rank": (3, 0, 2), "bottleneck": (0, 4, 2), "dropout": 0.0},
}
NO_ATTENTION = {"targets": ("fc1", "fc2")}


def table() -> dict[str, dict[str, str]]:
    """docs/adapters.md: method -> column -> "yes" or "no: why"."""
    lines = (Path(__file__).parents[2] / "docs" / "adapters.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    rows = list(itertools.takewhile(lambda row: len(row) == len(rows[0]), rows))
    return {row[0].strip("`"): dict(zip(rows[0][1:], row[1:], strict=True)) for row in rows[2:]}


TABLE = table()
CELLS = [
    (method, backbone, row[column])
    for method, row in TABLE.items()
    for column, backbones in ARCHITECTURES.items()
    for backbone in backbones
    if method in ADAPTERS
]
WORKS = [(method, backbone) for method, backbone, cell in CELLS if cell == "yes"]
MERGES = [(method, backbone) for method, backbone in WORKS if TABLE[method]["merges"] == "yes"]


def configured(method: str, backbone: str) -> Adapter:
    settings = dict(SETTINGS.get(method, {}))
    if backbone == "convnext" and "targets" in settings:
        settings |= NO_ATTENTION
    return ADAPTERS[method](**settings)


# Of one kind; noah's are of two, LoRA's and a bottleneck's: test_noah.py.
SUBSPACES = ("lora", "moslora", "adalora", "fact_tt", "fact_tk", "dtl", "dtl_plus", "houlsby", "adaptformer")
WHOLE = ("full", "linear", "partial", "bitfit")  # no update beside the weights: they train themselves
BFLOAT16 = 0.05  # of the outputs' norm; docs/adapters.md says so


def adapted(method: str, backbone: str) -> nn.Module:
    model = build(backbone)
    torch.manual_seed(2)
    return inject(model, configured(method, backbone), train=("head",))


def trained(method: str, backbone: str, steps: int = 2) -> nn.Module:
    """A few large steps, so that nothing is at its first value."""
    model = adapted(method, backbone).train()
    for _ in steps_of(model, backbone, steps):
        pass
    return model.eval()


def filled(method: str, backbone: str) -> nn.Module:
    """Everything that trains is random, so that no factor is near zero: after two steps some of AdaLoRA's and FacT's
    updates are smaller than the tolerance of a comparison."""
    model = adapted(method, backbone).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return model


def steps_of(model: nn.Module, backbone: str, steps: int) -> Iterator[None]:
    """Yields between the backward pass and the step."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(*inputs(backbone)), torch.tensor([0, 1, 2])).backward()
        yield
        optimizer.step()


def subspaces_of(model: nn.Module) -> set[str]:
    with capture(model, on="weights") as weights:
        return set(weights)


def weight_of(module: nn.Module, role: str) -> Tensor:
    """Of a role: a third of a fused layer, a part of FacT's first MLP layer, or the whole."""
    weight: Tensor = module.in_proj_weight if hasattr(module, "in_proj_weight") else module.weight
    if role in ("q", "k", "v") and len(weight) == 3 * weight.shape[1]:
        return weight.chunk(3)["qkv".index(role)]
    if role.startswith("fc1_"):
        return weight.chunk(4)[int(role.removeprefix("fc1_"))]
    return weight

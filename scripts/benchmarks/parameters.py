"""Trained parameters of the paper's Tables 1-3: ours, counted on the full-size backbones, beside what is printed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import open_clip
import timm
import torch
from torch import nn
from transformers import BertConfig, BertModel

from adapters import ADAPTERS, inject, trainable_parameters
from benchmarks.options import Options
from benchmarks.tables import markdown

QKV, QV = ("q", "k", "v"), ("q", "v")
PROJECTION = 768 * 1024 + 1024  # VSE-infinity's linear map behind BERT
PROJECTIONS = 768 * 512 + 512 * 512  # CLIP's two


@dataclass(frozen=True, kw_only=True)
class Settings(Options):
    """Nothing besides where to write."""


@dataclass(frozen=True)
class Row:
    """One number of the paper, in millions as printed, and the configuration that it is compared with."""

    backbone: str
    method: str
    paper: str
    settings: dict[str, Any]
    head: int = 0
    """Parameters of a head that the paper's number includes."""
    why: str = ""
    """Why it differs, or what it consists of."""


MIXED = "the mean over data sets of different {}"
ROWS = (
    Row("ViT-B/16", "full", "85.8", {}),
    Row("ViT-B/16", "bitfit", "0.10", {}),
    Row("ViT-B/16", "vpt", "0.56", {"prompts": 61}, why=MIXED.format("numbers of prompts, 60.95: 561,691")),
    Row("ViT-B/16", "lst", "2.38", {"reduction": 8}, why="and 12 gates, one a block"),
    Row("ViT-B/16", "adalora", "0.44", {"rank": 8, "targets": QKV}),
    Row("ViT-B/16", "adaptformer", "0.16", {"bottleneck": 8}),
    Row(
        "ViT-B/16", "noah", "0.43", {"prompts": 5, "rank": 5, "bottleneck": 5},
        why=MIXED.format("numbers in each block, as searched and released: 360,134; 0.43 is unknown"),
    ),
    Row("ViT-B/16", "ssf", "0.21", {}),
    Row("ViT-B/16", "fact_tk", "0.07", {"rank": 32}, why=MIXED.format("ranks, 13 at 32 and 6 at 16: 68,985")),
    Row("ViT-B/16", "fact_tt", "0.04", {"rank": 16}, why=MIXED.format("ranks, at most 16: 39,734")),
    Row("ViT-B/16", "lora", "0.44", {"rank": 8, "targets": QKV}),
    Row("ViT-B/16", "lora", "0.22", {"rank": 4, "targets": QKV}),
    Row("ViT-B/16", "lora", "0.11", {"rank": 2, "targets": QKV}),
    Row("ViT-B/16", "moslora", "0.40", {"rank": 8, "targets": QKV}, why="a mixer adds to LoRA's 0.44; a misprint"),
    Row("ViT-B/16", "dtl", "0.04", {}),
    Row("ViT-B/16", "dtl_plus", "0.04", {}, why="DTL's own; with kernels of 3 to 5 by data set the mean is 0.05"),
    Row("Swin-B", "full", "86.7", {}),
    Row("Swin-B", "bitfit", "0.20", {}, why="with the tables of relative positions, whose name holds “bias”"),
    Row("Swin-B", "vpt", "0.16", {"prompts": 13}, why=MIXED.format("numbers of prompts, about 13")),
    Row("Swin-B", "fact_tk", "0.14", {"rank": 16}, why=MIXED.format("ranks, 13 at 16 and 6 at 32: 139,507")),
    Row("Swin-B", "dtl", "0.09", {"rank": 4}),
    Row("Swin-B", "dtl_plus", "0.09", {"rank": 4, "kernel": 5}, why="what is printed is DTL's number"),
    Row("ConvNeXt-B", "full", "-", {}),
    Row("ConvNeXt-B", "lora", "0.58", {"rank": 8, "targets": ("fc1", "fc2")}, why="0.58 is LoRA on q, k, v of Swin-B"),
    Row("Swin-B", "lora", "-", {"rank": 8, "targets": QKV}, why="see ConvNeXt-B"),
    Row("BERT", "full", "109.5", {}, why="without the projection"),
    Row("BERT", "partial", "0.8", {}, PROJECTION, "the projection alone"),
    Row("BERT", "houlsby", "2.6", {"bottleneck": 48}, PROJECTION, "with the projection"),
    Row("BERT", "bitfit", "0.9", {}, PROJECTION, "with the projection"),
    Row("BERT", "prefix", "10.7", {"prompts": 30, "hidden": 512}, PROJECTION, "with the projection"),
    Row("BERT", "ssf", "0.2", {}, why="without the projection"),
    Row("BERT", "fact_tt", "0.6", {"rank": 60}, why="the rank is not given; no power of two fits"),
    Row("BERT, no pooler", "lst", "7.5", {"reduction": 4, "output_dim": 1024}, why="in place of the projection"),
    Row("BERT, no pooler", "unipt", "5.9", {"dim": 512, "output_dim": 1024}, why="in place of the projection"),
    Row("BERT", "adalora", "1.0", {"rank": 6, "targets": QV}, PROJECTION, "the rank is not given; with the projection"),
    Row("BERT", "lora", "1.1", {"rank": 8, "targets": QV}, PROJECTION, "with the projection"),
    Row("CLIP ViT-B/32", "full", "151.3", {}),
    Row("CLIP ViT-B/32", "partial", "0.7", {}),
    Row(
        "CLIP ViT-B/32", "houlsby", "5.2", {"bottleneck": 64, "bottleneck_pattern": {"visual": 96}},
        why="an eighth of each width is the nearest; no usual size gives 5.2",
    ),
    Row("CLIP ViT-B/32", "bitfit", "0.1", {"norms": False}, why="without the norms' biases; 0.2 with them"),
    Row("CLIP ViT-B/32", "vpt", "0.2", {"prompts": 10}),
    Row("CLIP ViT-B/32", "ssf", "0.5", {}, why="unknown; a second scale and shift behind each activation gives 0.47"),
    Row("CLIP ViT-B/32", "fact_tt", "0.8", {"rank": 48}, why="the rank is not given, and is not that of BERT"),
    Row("CLIP ViT-B/32", "lst", "11.2", {"reduction": 4}, why="unknown; with the two projections trained 11.3"),
    Row("CLIP ViT-B/32", "unipt", "9.6", {"dim": 512}),
    Row("CLIP ViT-B/32", "adalora", "1.2", {"rank": 6, "targets": QKV}, PROJECTIONS, "rank and targets are not given"),
    Row("CLIP ViT-B/32", "lora", "1.3", {"rank": 7, "targets": QKV}, PROJECTIONS, "rank and targets are not given"),
)  # fmt: skip

BACKBONES: dict[str, Callable[[], nn.Module]] = {
    "ViT-B/16": lambda: timm.create_model("vit_base_patch16_224", num_classes=0),
    "Swin-B": lambda: timm.create_model("swin_base_patch4_window7_224", num_classes=0),
    "ConvNeXt-B": lambda: timm.create_model("convnext_base", num_classes=0),
    "BERT": lambda: BertModel(BertConfig()),
    "BERT, no pooler": lambda: BertModel(BertConfig(), add_pooling_layer=False),
    "CLIP ViT-B/32": lambda: open_clip.create_model("ViT-B-32-quickgelu", pretrained=None, device="meta"),
}
PAGE = """# Trained parameters

What the paper's Tables 1 to 3 print, in millions, beside what our adapters train in the same backbones at full size,
counted without the classification head. Made by `python scripts/benchmark.py parameters`;
`tests/scripts/test_parameters.py` holds the integers.

{table}
"""


def count(row: Row) -> int:
    """Parameters that train, on the meta device: nothing is allocated."""
    with torch.device("meta"):
        model = BACKBONES[row.backbone]()
        inject(model, ADAPTERS[row.method](**row.settings))
    return trainable_parameters(model) + row.head


def run(settings: Settings) -> tuple[str, None]:
    """Count -> the page, which holds all numbers."""
    lines = []
    for row in ROWS:
        ours = count(row)
        chosen = ", ".join(f"{name} {value}" for name, value in row.settings.items())
        lines.append([row.backbone, f"`{row.method}`", chosen, f"{ours:,}", row.paper, row.why])
    return PAGE.format(table=markdown(["Backbone", "Method", "Settings", "Ours", "Paper (M)", "Remark"], lines)), None

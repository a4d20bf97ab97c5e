"""The models that `benchmarks.adapters` compares: a backbone with an adapter, with PEFT's LoRA or bare."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import peft
import timm
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

from adapters import ADAPTERS, LoRA, inject, trainable_parameters
from benchmarks.training_step import Step

PEFT = "PEFT's LoRA"
BACKBONES = ("vit", "vit_transformers", "bert")
CLASSES = 100
RANK = 8
"""Of our LoRA and PEFT's where the two are compared."""
# Backbones with a table of all methods: settings of the paper's Tables 1 and 2; what is not named has its defaults.
OF_PAPER: dict[str, dict[str, Any]] = {
    "vit": {
        **{name: {"rank": RANK, "targets": ("q", "k", "v")} for name in ("lora", "moslora", "adalora")},
        "adaptformer": {"bottleneck": 8},
        "lst": {"reduction": 8},
    },
    "bert": {"lst": {"reduction": 4}},
}


class Pair(NamedTuple):
    """Our LoRA and PEFT's on the same layers of a backbone."""

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
    return inject(backbone(pair.backbone, tiny), LoRA(rank=RANK, targets=pair.targets), train=("head",))


def with_peft(pair: Pair, tiny: bool, rank: int = RANK) -> nn.Module:
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=list(pair.modules))
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


def step(
    model: nn.Module, name: str, batch: int, precision: torch.dtype = torch.float32, keep_casts: bool = False
) -> Step:
    torch.manual_seed(1)
    inputs = batch_of(name, batch)
    return Step(model, inputs, torch.randint(CLASSES, (len(inputs[0]),)), precision, keep_casts)


def trained_without_head(model: nn.Module) -> int:
    return trainable_parameters(model) - (768 * CLASSES + CLASSES)

"""A small BERT with PEFT's LoRA and with ours; no test module, so that spawned processes can import it."""

from __future__ import annotations

from typing import Any

import adapters  # noqa: F401  (before peft, which imports torchvision)

# isort: split
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from adapters import LoRA, inject
from regularizers import ReSoRA

IDS = torch.randint(1, 50, (3, 6), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0]])
QUERY = "base_model.model.bert.encoder.layer.1.attention.self.query"


def bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def with_peft(**settings: Any) -> PeftModel:
    config = {"r": 4, "lora_alpha": 12, "target_modules": ["query", "value"]} | settings
    model = get_peft_model(bert(), LoraConfig(**config))
    fill(model)
    return model.eval()


def with_ours() -> nn.Module:
    model = inject(bert(), LoRA(rank=4, alpha=12, targets=("q", "v")), train=("classifier",))
    fill(model)
    return model.eval()


def fill(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "lora_B" in name or name.endswith(".B"):
            nn.init.normal_(parameter, std=0.5)


def penalty(model: nn.Module, **batch: Tensor) -> Tensor:
    resora = ReSoRA("overlap", weight=1.0)  # moves A and B
    with resora.capture(model) as subspaces:
        model(**batch)
    return next(iter(resora(subspaces).values()))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

"""Small models that PEFT and this suite both adapt, what they put out, and adapters on them that look trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    CLIPConfig,
    CLIPModel,
    ViTConfig,
    ViTModel,
)

D = 32
SMALL = {"hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def bert() -> nn.Module:
    return BertForSequenceClassification(BertConfig(vocab_size=50, num_labels=3, **SMALL))


def clip() -> nn.Module:
    text = {"vocab_size": 50, "max_position_embeddings": 12, "bos_token_id": 1, "eos_token_id": 49, "pad_token_id": 0}
    vision = {"image_size": 16, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=SMALL | text, vision_config=SMALL | vision, projection_dim=16))


def vit() -> nn.Module:
    return ViTModel(ViTConfig(image_size=16, patch_size=8, **SMALL))


def timm_vit() -> nn.Module:
    import timm

    return timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=D, num_heads=4, depth=2, num_classes=5
    )


IDS = torch.arange(1, 13).remainder(49).view(2, 6)
IMAGES = torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)
RUN: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Tensor]]] = {
    "bert": (bert, lambda model: model(input_ids=IDS).logits),
    "clip": (clip, lambda model: _similarities(model(input_ids=IDS, pixel_values=IMAGES))),
    "vit": (vit, lambda model: model(pixel_values=IMAGES).last_hidden_state),
    "timm": (timm_vit, lambda model: model(IMAGES)),
}
HEAD = {"bert": "classifier", "clip": "visual_projection", "vit": "layernorm", "timm": "head"}
IN_PEFT = {
    "bert": ["query", "value", "intermediate.dense"],
    "clip": ["q_proj", "v_proj", "out_proj"],
    "vit": ["q_proj", "fc2"],
    "timm": ["qkv", "fc1"],
}
IN_OURS = {"bert": ("q", "v", "fc1"), "clip": ("q", "v", "o"), "vit": ("q", "fc2"), "timm": ("q", "k", "v", "fc1")}
BACKBONES = list(RUN)


def _similarities(output: Any) -> Tensor:
    return torch.cat([output.text_embeds, output.image_embeds])


def stock(name: str) -> nn.Module:
    """The same large weights each time: at a width of 32 the usual ones let an adapter do next to nothing."""
    torch.manual_seed(0)
    model = RUN[name][0]().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    return model


def outputs(name: str, model: nn.Module) -> Tensor:
    with torch.no_grad():
        return RUN[name][1](model)


def shaken(model: nn.Module) -> nn.Module:
    """Every trained tensor moves, as if trained."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval()


def of_peft(name: str, folder: Path, config: type[peft.LoraConfig] = peft.LoraConfig, **settings: Any) -> nn.Module:
    settings = {"target_modules": IN_PEFT[name], "modules_to_save": [HEAD[name]], "r": 4, "lora_alpha": 6} | settings
    wrapped = shaken(peft.get_peft_model(stock(name), config(**settings)))
    wrapped.save_pretrained(folder)
    return wrapped


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def differs(name: str, model: nn.Module) -> None:
    assert (outputs(name, model) - outputs(name, stock(name))).abs().max() > 1e-2

"""Tiny models of every architecture that adapters go into, real classes with random weights, and an input for each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

WIDTH, CLASSES = 32, 5


class WithHead(nn.Module):
    """A backbone under the path "backbone" and a linear head."""

    def __init__(self, backbone: nn.Module, width: int) -> None:
        super().__init__()
        self.backbone, self.head = backbone, nn.Linear(width, CLASSES)


class Bert(WithHead):
    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        states = self.backbone(input_ids=ids, attention_mask=mask).last_hidden_state
        return self.head((states * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True))


class Image(WithHead):
    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images))


class Clip(WithHead):
    """Both towers: an image's and a text's features, side by side."""

    def forward(self, images: Tensor, texts: Tensor) -> Tensor:
        features = [self.backbone.encode_image(images), self.backbone.encode_text(texts)]
        return self.head(torch.cat(features, dim=1))


def bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=50, hidden_size=WIDTH, num_hidden_layers=3, num_attention_heads=4, intermediate_size=4 * WIDTH,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, max_position_embeddings=40,
    )  # fmt: skip
    return Bert(BertModel(config, add_pooling_layer=False), WIDTH)


def vit() -> nn.Module:
    import timm

    return Image(
        timm.create_model(
            "vit_tiny_patch16_224", img_size=32, embed_dim=WIDTH, num_heads=4, depth=3, num_classes=0, patch_size=8
        ),
        WIDTH,
    )


def swin() -> nn.Module:
    import timm

    return Image(
        timm.create_model(
            "swin_tiny_patch4_window7_224", img_size=64, embed_dim=16, depths=(2, 2), num_heads=(2, 4), window_size=4,
            num_classes=0, drop_path_rate=0.0,
        ),
        32,
    )  # fmt: skip


def convnext() -> nn.Module:
    import timm

    return Image(
        timm.create_model(
            "convnext_tiny", depths=(1, 1, 2, 1), dims=(8, 16, 24, 32), num_classes=0,
            ls_init_value=0.5,  # at its default, 1e-6, nothing that a block does would be seen
        ),
        32,
    )  # fmt: skip


def clip(own_attention: bool = False, **options: Any) -> nn.Module:
    from open_clip.model import CLIP

    towers: dict[str, Any] = {
        "vision_cfg": {"image_size": 32, "layers": 3, "width": WIDTH, "head_width": 8, "patch_size": 8},
        "text_cfg": {"context_length": 12, "vocab_size": 50, "width": 24, "heads": 4, "layers": 3},
    }
    if own_attention:
        for tower in towers.values():
            tower["block_type"] = "custom"
    return Clip(CLIP(embed_dim=16, quick_gelu=True, **towers, **options), 32)


def in_low_precision(name: str) -> nn.Module:
    """The CLIP model of a backbone as open_clip's `precision="bf16"` makes it: norms stay in float32."""
    from open_clip.model import convert_weights_to_lp

    model = clip(own_attention=name != "clip", cast_dtype=torch.bfloat16).backbone
    convert_weights_to_lp(model, torch.bfloat16)
    return model


def clip_own_attention() -> nn.Module:
    """open_clip's blocks with its own `Attention`, as in every block of releases after 3.3.0."""
    return clip(own_attention=True)


def images(batch: int = 3, side: int = 32) -> tuple[Tensor, ...]:
    return (torch.randn(batch, 3, side, side),)


def token_ids(batch: int = 3) -> tuple[Tensor, ...]:
    lengths = torch.arange(batch) + 5
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    return torch.randint(3, 50, mask.shape) * mask, mask


def images_and_texts(batch: int = 3) -> tuple[Tensor, ...]:
    texts = torch.randint(3, 40, (batch, 12))
    texts[:, 6] = 49  # the end of the text has the highest id
    texts[:, 7:] = 0
    return *images(batch), texts


BACKBONES: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]]]] = {
    "bert": (bert, token_ids),
    "clip": (clip, images_and_texts),
    "clip, own attention": (clip_own_attention, images_and_texts),
    "vit": (vit, images),
    "swin": (swin, lambda: images(side=64)),
    "convnext": (convnext, images),
}


def build(name: str) -> nn.Module:
    """The same random weights each time, in evaluation mode."""
    torch.manual_seed(0)
    return BACKBONES[name][0]().eval()


def inputs(name: str) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    return BACKBONES[name][1]()

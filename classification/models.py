"""The classification models by name: a pretrained backbone, whole or cut where training begins, and a linear head."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from classification.timm_models import ImageClassifier, timm_classifier
from training import choose


class Patches(NamedTuple):
    """The patches of a ViT, under the names of timm's `PatchEmbed`: rows and columns of the grid, pixels of a patch."""

    grid_size: tuple[int, int]
    patch_size: tuple[int, int]


class TokenClassifier(nn.Module):
    """The trained end of a ViT: its last blocks and norm, and a linear head on the normalised class token.

    Its input are the tokens that the blocks before it put out (with no block before it: the patches with their
    positions). Blocks keep the numbers that they have in the whole model, so that a target has the same path in both.

    Args:
        blocks: the last blocks, by their number in the whole model.
        norm: the model's final norm.
        width: of a token.
        classes: number of classes.
        patches: how the tokens lie in the image, which adapters with a convolution over it (DTL+) ask for.
        num_prefix_tokens: tokens before the patches (class and register tokens).
        frozen_parameters: how many parameters the blocks before it have.
    """

    heads = ("head",)

    def __init__(
        self,
        blocks: Mapping[int, nn.Module],
        norm: nn.Module,
        *,
        width: int,
        classes: int,
        patches: Patches,
        num_prefix_tokens: int = 1,
        frozen_parameters: int = 0,
    ) -> None:
        super().__init__()
        self.patch_embed, self.num_prefix_tokens = patches, num_prefix_tokens  # under timm's names
        self.blocks = nn.ModuleDict({str(number): block for number, block in blocks.items()})
        self.norm = norm
        self.head = nn.Linear(width, classes)
        self.frozen_parameters = frozen_parameters

    def forward(self, tokens: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """tokens (B, T, width) -> {"logits": (B, C)}, and the labels (B,) handed through where they are given."""
        for block in self.blocks.values():
            tokens = block(tokens)
        outputs = {"logits": self.head(self.norm(tokens)[:, 0])}
        return outputs if labels is None else outputs | {"labels": labels}


def split_vit(vit: Any, frozen_blocks: int, classes: int) -> tuple[nn.Module, TokenClassifier]:
    """Cut a timm ViT behind its first `frozen_blocks` blocks.

    Returns:
        The frozen beginning (`forward_features` gives tokens (B, T, width)) and the end to train. The whole model is
        used up: the two share its modules.

    Raises:
        ValueError: `frozen_blocks` is out of range.
    """
    depth = len(vit.blocks)
    if not 0 <= frozen_blocks < depth:
        raise ValueError(
            f"model.frozen_blocks is {frozen_blocks}; expected 0 (all train) to {depth - 1}, of {depth} blocks in all"
        )
    last = dict(list(enumerate(vit.blocks))[frozen_blocks:])
    norm, vit.blocks, vit.norm = vit.norm, vit.blocks[:frozen_blocks], nn.Identity()
    vit.reset_classifier(0)
    frozen = vit.requires_grad_(False).eval()
    parameters = sum(parameter.numel() for parameter in frozen.parameters())
    end = TokenClassifier(
        last,
        norm,
        width=vit.embed_dim,
        classes=classes,
        patches=Patches(vit.patch_embed.grid_size, vit.patch_embed.patch_size),
        num_prefix_tokens=vit.num_prefix_tokens,
        frozen_parameters=parameters,
    )
    return frozen, end.eval()


def dinov2_small(
    cache: Path, image_size: int, classes: int, *, frozen_blocks: int = 8
) -> tuple[nn.Module, TokenClassifier]:
    """DINOv2 ViT-S/14 (22 M parameters, 12 blocks), of which the first `frozen_blocks` are never trained.

    At the default of 8 a step computes a third of the blocks, and every adapter lives in the last 4; "full" fine-tuning
    then trains these 4 blocks, the norm and the head. 0 trains the whole stack of blocks (the patch
    and position embedding stay frozen).

    Args:
        cache: folder of the pretrained encoders.
        image_size: pixels, a multiple of 14.
        classes: number of classes.
        frozen_blocks: 0 to 11.
    """
    from training.encoders import dinov2_small as encoder

    return split_vit(encoder(cache, image_size), frozen_blocks, classes)


Classifier = TokenClassifier | ImageClassifier
"""What trains: ``model(**inputs, labels) -> {"logits": (B, C), "labels": (B,)}``, with the paths of its `heads`."""

MODELS: dict[str, Callable[..., tuple[nn.Module | None, Classifier]]] = {
    "dinov2_small": dinov2_small,
    "vit_b16": timm_classifier,
    "swin_b": timm_classifier,
    "convnext_b": timm_classifier,
}


def build_model(
    settings: Mapping[str, Any], *, cache: Path, image_size: int, classes: int
) -> tuple[nn.Module | None, Classifier]:
    """Build the model that `settings` name: (frozen beginning or None, what trains), both in evaluation mode.

    `normalization` among them is of the pixels that the weights know, which is for the data to follow.

    Raises:
        ValueError: if the model or one of its settings is unknown or out of range.
    """
    own = {key: value for key, value in settings.items() if key != "normalization"}
    return choose("model", MODELS, {**own, "cache": cache, "image_size": image_size, "classes": classes})

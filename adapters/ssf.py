"""SSF: scale and shift the features (Lian et al., NeurIPS 2022, https://arxiv.org/abs/2210.08823)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from adapters.attention import StepwiseAttention, StepwiseMultiheadAttention
from adapters.extend import Extension, extend, restore
from adapters.targets import WHOLE, check_plain, linear_maps
from adapters.towers import Tower, find_towers

# Ends of the paths of the convolutions that are scaled: patches, ConvNeXt's, and an MLP that is made of convolutions.
CONVOLUTIONS = re.compile(r"(?:^|\.)(?:patch_embed\.proj|conv1|stem\.\d+|conv_dw|downsample\.\d+|mlp\.fc[12])$")


@dataclass(frozen=True, kw_only=True)
class SSF:
    r"""Scale and shift the output of every operation, by channel: :math:`Y' = \gamma \odot Y + \beta` (section 3.2).

    The operations are a tower's linear maps of attention and MLP (a fused q, k, v as one map of 3 d channels), its
    layer norms, and the convolutions of its patches and of ConvNeXt's blocks and downsampling. Swin's reduction of
    merged patches is none of them: so the counts are 205,824 on ViT-B/16, 274,432 on Swin-B, 204,288 on BERT-base and
    343,552 on CLIP ViT-B/32. gamma starts as N(1, 0.02), beta as N(0, 0.02), so the start is near the backbone, not it.

    Merging is exact: W <- diag(gamma) W, b <- gamma b + beta. A layer without a bias has no place for beta and is only
    scaled, except the patch convolution of CLIP's image tower: its beta goes to the patches' position embeddings.
    """

    name: ClassVar[str] = "ssf"
    not_mergeable: ClassVar[str] = ""

    def apply(self, model: nn.Module) -> None:
        found: dict[nn.Module, tuple[Tower, bool]] = {}  # of all towers before anything changes: one may be refused
        for tower in reversed(find_towers(model, method=self.name)):  # CLIP's image tower is inside its text tower
            for module, channels_first in _operations(tower):
                found.setdefault(module, (tower, channels_first))
        for module, (tower, channels_first) in found.items():
            positioned = tower.kind == "clip_vision" and module is tower.module.conv1 and module.bias is None
            if isinstance(module, nn.Linear | nn.LayerNorm | nn.Conv2d):
                scaled: Scaled = extend(module, ScaledOutput)
            elif isinstance(module, nn.MultiheadAttention):
                scaled = extend(module, ScaledMultiheadAttention)
            else:
                scaled = extend(module, ScaledAttention)
            weight, bias = scaled.affine()
            scale, shift = torch.empty(len(weight)).normal_(1, 0.02), torch.empty(len(weight)).normal_(0, 0.02)
            scaled.channels_first = channels_first
            scaled.ssf_scale = nn.Parameter(scale.to(weight))
            scaled.ssf_shift = None if bias is None and not positioned else nn.Parameter(shift.to(weight))
            if positioned:
                extend(tower.module, ShiftedPatches)


def _operations(tower: Tower) -> Iterator[tuple[nn.Module, bool]]:
    """The modules of a tower whose outputs are scaled, and whether their channels come first, as in (B, C, H, W)."""
    if any(isinstance(getattr(module, "q_bias", None), nn.Parameter) for module in tower.module.modules()):
        raise ValueError(
            "ssf scales what layers put out, but attention with a q_bias (timm's BEiT, EVA and Swin v2) reads "
            "the weight of qkv and never calls it"
        )
    sites = [site for site in linear_maps(tower.module) if site.role != WHOLE]
    check_plain(sites)
    linear = {site.module for site in sites}
    images_last = {
        module
        for block in tower.blocks
        if tower.kind == "convnext" and not block.module.use_conv_mlp  # such blocks permute to (B, H, W, C)
        for module in block.module.modules()
    }
    for path, module in tower.module.named_modules():
        if module in linear:
            yield module, False
        elif isinstance(module, nn.Conv2d) and CONVOLUTIONS.search(path):
            yield module, True
        elif isinstance(module, nn.LayerNorm) and module.weight is not None:
            yield module, tower.kind == "convnext" and module not in images_last


class Scaled(Extension):
    """A module with an affine map, whose output channels are scaled and shifted.

    Attributes:
        ssf_scale: gamma (d_out,).
        ssf_shift: beta (d_out,), or None.
        channels_first: whether the channels are the third dimension from the end, not the last.
    """

    added = ("ssf_scale", "ssf_shift", "channels_first")
    ssf_scale: nn.Parameter
    ssf_shift: nn.Parameter | None
    channels_first: bool

    def affine(self) -> tuple[nn.Parameter, nn.Parameter | None]:
        """The weight (d_out, ...) and the bias (d_out,) that scale and shift are folded into."""
        return self.weight, self.bias  # type: ignore[return-value]

    def scaled(self, y: Tensor, channels: slice | None = None) -> Tensor:
        """y (..., d_out), or (..., d_out, H, W), or `channels` of it -> the same, in the same dtype."""
        scale: Tensor = self.ssf_scale
        shift: Tensor | None = self.ssf_shift
        if channels is not None:
            scale, shift = scale[channels], None if shift is None else shift[channels]
        if self.channels_first:
            scale, shift = scale[:, None, None], None if shift is None else shift[:, None, None]
        if y.dtype == scale.dtype:
            return y * scale if shift is None else torch.addcmul(shift, y, scale)
        # Autocast: near 1, bfloat16's steps are as large as the differences between scales.
        change = (scale - 1).to(y.dtype)
        return y + (y * change if shift is None else torch.addcmul(shift.to(y.dtype), y, change))

    @torch.no_grad()
    def merge(self) -> None:
        """Fold scale and shift into weight and bias, in float32 at least, and become a stock module again."""
        weight, bias = self.affine()
        scale = _wide(self.ssf_scale)
        weight.copy_(_wide(weight) * scale.view(-1, *[1] * (weight.dim() - 1)))
        if bias is not None and self.ssf_shift is not None:
            bias.copy_(_wide(bias) * scale + _wide(self.ssf_shift))
        restore(self)


class ScaledOutput(Scaled):
    """A linear layer, layer norm or convolution with scaled outputs."""

    def forward(self, x: Tensor) -> Tensor:
        return self.scaled(super().forward(x))


class ScaledMultiheadAttention(Scaled, StepwiseMultiheadAttention):
    """`torch.nn.MultiheadAttention` with scaled q, k and v; its out_proj is a layer of its own."""

    def affine(self) -> tuple[nn.Parameter, nn.Parameter | None]:
        return self.in_proj_weight, self.in_proj_bias  # type: ignore[return-value]

    def project(self, x: Tensor, rows: tuple[int, int] | None = None) -> Tensor:
        return self.scaled(super().project(x, rows), rows and slice(*rows))


class ScaledAttention(Scaled, StepwiseAttention):
    """open_clip's own `Attention`, likewise."""

    def affine(self) -> tuple[nn.Parameter, nn.Parameter | None]:
        return self.in_proj_weight, self.in_proj_bias

    def project(self, x: Tensor) -> Tensor:
        return self.scaled(super().project(x))


class ShiftedPatches(Extension):
    """CLIP's image tower, whose `conv1` has a shift but no bias: position embeddings are added to the same patches."""

    positional_embedding: nn.Parameter
    conv1: Scaled

    @torch.no_grad()
    def merge(self) -> None:
        """Fold the shift of `conv1` into the position embeddings; `conv1`, which is merged next, folds in its scale."""
        shift, patches = self.conv1.ssf_shift, self.positional_embedding[1:]  # the first is the class token's
        assert shift is not None
        patches.copy_(_wide(patches) + _wide(shift))
        self.conv1.ssf_shift = None
        restore(self)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))

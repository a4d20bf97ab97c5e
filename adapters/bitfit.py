"""BitFit: train the biases (Ben Zaken et al., ACL 2022, https://arxiv.org/abs/2106.10199)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from adapters.towers import Tower, find_towers


@dataclass(frozen=True, kw_only=True)
class BitFit:
    """Every bias of the towers trains, and nothing else: all parameters whose own name contains "bias".

    These are also the shifts of layer norms, the raw in_proj_bias of CLIP's attention and, in the counts that the
    ReSoRA paper reports, Swin's relative_position_bias_table. Published counts: 102,912 on ViT-B/16 and on BERT-base
    with its pooler, 200,760 on Swin-B (137,216 without tables), 130,304 on ConvNeXt-B, 171,008 on CLIP ViT-B/32
    (138,240 without norms, the 0.1 M of the paper's Table 1). No parameter is new: there is nothing to merge.

    Heads are not part of a tower, also where timm keeps one inside it: `inject(..., train=...)` names them.

    Args:
        norms: whether the biases of norms train. Default: True.
        position_tables: whether tables of relative position biases train, one value for each offset and head.
            Default: True, as in the published count.
    """

    name: ClassVar[str] = "bitfit"
    not_mergeable: ClassVar[str] = ""
    norms: bool = True
    position_tables: bool = True

    def apply(self, model: nn.Module) -> None:
        trains = [bias for tower in find_towers(model, method=self.name) for bias in self._biases(tower)]
        if not trains:
            raise ValueError(f"bitfit trains biases, but the towers of {type(model).__name__} have none with {self}")
        for bias in trains:
            bias.requires_grad_(True)

    def _biases(self, tower: Tower) -> list[nn.Parameter]:
        heads = _classifier(tower.module)
        return [
            parameter
            for module in tower.module.modules()
            if module not in heads and (self.norms or not _is_norm(module))
            for name, parameter in module.named_parameters(recurse=False)
            # a scalar is no layer's bias but the loss's (SigLIP's logit_bias)
            if "bias" in name and (parameter.dim() == 1 or (parameter.dim() > 1 and self.position_tables))
        ]


def _is_norm(module: nn.Module) -> bool:
    """Norms of any class have a weight with one value for each channel."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.dim() == 1


def _classifier(tower: nn.Module) -> set[nn.Module]:
    """The modules of timm's own classifier, which is inside the tower (two of them in a distilled DeiT)."""
    heads = tower.get_classifier() if hasattr(tower, "get_classifier") else ()  # type: ignore[operator]
    return {module for head in (heads if isinstance(heads, tuple) else (heads,)) for module in head.modules()}

"""Contrastive losses on matching rows of two batches of unit embeddings.

A loss is a function of embeddings (B, D), (B, D) that returns named parts; the parts add up to what is minimised. Row
b of one side matches row b of the other, and every other row is taken for a negative, also where two captions of one
image meet in a batch, as in VSE-infinity and CLIP4Clip.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class TripletLoss:
    """The hinge loss of VSE++ (Faghri et al., BMVC 2018) with VSE-infinity's warm-up.

    sum_b [margin + s(b, n) - s(b, b)]_+ in both directions, over all negatives n in the warm-up epochs and over the
    hardest one afterwards. A model that has collapsed to one point stays at 2 B margin.

    Args:
        margin: Default: 0.2.
        warmup_epochs: epochs (counted over all stages) that sum over all negatives. Default: 1.
    """

    margin: float = 0.2
    warmup_epochs: float = 1.0

    def __call__(self, outputs: dict[str, Tensor], epoch: float) -> dict[str, Tensor]:
        scores = outputs["visual"] @ outputs["text"].T  # (B, B)
        own = scores.diagonal()
        diagonal = torch.eye(len(scores), dtype=torch.bool, device=scores.device)
        over_images = (self.margin + scores - own[None, :]).clamp(min=0).masked_fill(diagonal, 0.0)
        over_texts = (self.margin + scores - own[:, None]).clamp(min=0).masked_fill(diagonal, 0.0)
        if epoch < self.warmup_epochs:
            return {"triplet": over_texts.sum() + over_images.sum()}
        return {"triplet": over_texts.amax(dim=1).sum() + over_images.amax(dim=0).sum()}


@dataclass(frozen=True, kw_only=True)
class InfoNCE:
    """Symmetric cross-entropy over the batch, (CE(rows) + CE(columns)) / 2, as in CLIP.

    Args:
        temperature: scores are divided by it, unless the model brings a learned `logit_scale`. Default: 0.05.
    """

    temperature: float = 0.05

    def __call__(self, outputs: dict[str, Tensor], epoch: float) -> dict[str, Tensor]:
        scale = outputs.get("logit_scale", 1.0 / self.temperature)
        logits = scale * outputs["text"] @ outputs["visual"].T  # (B, B), rows are texts
        match = torch.arange(len(logits), device=logits.device)
        return {"info_nce": (F.cross_entropy(logits, match) + F.cross_entropy(logits.T, match)) / 2}


LOSSES: dict[str, Callable[..., Callable[[dict[str, Tensor], float], dict[str, Tensor]]]] = {
    "triplet": TripletLoss,
    "info_nce": InfoNCE,
}

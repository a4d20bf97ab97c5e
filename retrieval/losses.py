"""Contrastive losses on matching pairs.

A loss is a function of what a `RetrievalModel` puts out (embeddings (B, D), (B, D), say) that returns named parts; the
parts add up to what is minimised. Row b of one side matches row b of the other, and every other row is taken for a
negative, also where two captions of one image meet in a batch, as in VSE-infinity and CLIP4Clip. A pair that is not
"valid" is neither.

With several processes (torch.distributed), each computes the part of its own rows, against the columns of all: averaged
over the processes, as DistributedDataParallel does, value and gradients are those of one process with the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from retrieval.gather import gather, processes, rank

BY_PAIR = ("by_text", "by_visual")  # scores that a model brings itself


class Comparison(NamedTuple):
    """The scores of this process's V valid pairs with the N pairs of all processes."""

    by_visual: Tensor
    """(V, N): rows are images or clips, columns sentences."""
    by_text: Tensor
    """(V, N): rows are sentences, columns images or clips."""
    match: Tensor
    """(V,): the column of each row's own pair."""
    counts: Tensor
    """(N,) bool: the columns that are valid."""


def compare(outputs: dict[str, Tensor], scale: Tensor | float | None = None) -> Comparison:
    """Score what a model puts out; `scale` is the factor of the scores."""
    text = outputs["text"] if scale is None else scale * outputs["text"]
    visual = outputs["visual"]
    valid = outputs.get("valid", torch.ones(len(text), dtype=torch.bool, device=text.device))
    if "by_text" in outputs:
        by_text, by_visual = (outputs[name] if scale is None else scale * outputs[name] for name in BY_PAIR)
    else:
        by_text = text @ gather(visual).T
        by_visual = by_text.T if processes() == 1 else visual @ gather(text).T
    match = torch.arange(len(text), device=text.device) + rank() * len(text)
    return Comparison(by_visual[valid], by_text[valid], match[valid], gather(valid.to(torch.uint8)).bool())


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

    def __post_init__(self) -> None:
        if not self.margin > 0 or not self.warmup_epochs >= 0:
            raise ValueError(
                f"TripletLoss needs margin > 0 and warmup_epochs >= 0, but got margin={self.margin}, "
                f"warmup_epochs={self.warmup_epochs}"
            )

    def __call__(self, outputs: dict[str, Tensor], epoch: float) -> dict[str, Tensor]:
        pairs = compare(outputs)
        columns = torch.arange(len(pairs.counts), device=pairs.match.device)
        negative = pairs.counts & (columns != pairs.match[:, None])  # (V, N)

        def hinge(scores: Tensor) -> Tensor:
            own = scores.gather(1, pairs.match[:, None])
            costs = (self.margin + scores - own).clamp(min=0).masked_fill(~negative, 0.0)
            return costs.sum() if epoch < self.warmup_epochs else costs.amax(dim=1).sum()

        # A sum over the pairs of all processes, where gradients are averaged over them.
        return {"triplet": processes() * (hinge(pairs.by_visual) + hinge(pairs.by_text))}


@dataclass(frozen=True, kw_only=True)
class InfoNCE:
    """Symmetric cross-entropy over the batch, (CE(rows) + CE(columns)) / 2, as in CLIP; the mean over valid pairs.

    Args:
        temperature: scores are divided by it, unless the model brings a learned `logit_scale`, as CLIP4Clip does.
            Default: 0.05.
    """

    temperature: float = 0.05

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}; expected a positive number")

    def __call__(self, outputs: dict[str, Tensor], epoch: float) -> dict[str, Tensor]:
        pairs = compare(outputs, outputs.get("logit_scale", 1.0 / self.temperature))

        def entropy(logits: Tensor) -> Tensor:
            logits = logits.masked_fill(~pairs.counts, torch.finfo(logits.dtype).min)
            return F.cross_entropy(logits, pairs.match, reduction="sum")

        total = (entropy(pairs.by_text) + entropy(pairs.by_visual)) / 2
        return {"info_nce": total * processes() / pairs.counts.sum().clamp(min=1)}


LOSSES: dict[str, Callable[..., Callable[[dict[str, Tensor], float], dict[str, Tensor]]]] = {
    "triplet": TripletLoss,
    "info_nce": InfoNCE,
}

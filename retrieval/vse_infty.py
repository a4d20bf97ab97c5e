"""VSE-infinity: image regions and sentences in one space (Chen et al., CVPR 2021, https://arxiv.org/abs/2011.04305).

What the published code does besides what the paper says is mended by default. `protocol=as_published` (see
`scripts/conf/protocol`) has it back, all at once; each deviation is an option of the thing that it belongs to:

- `VSEInfinityConfig.padding_in_statistics`: the zero rows that pad a batch count in the region encoder's batch norm.
  Mended: real regions alone.
- `dev_images` of the data set: dev is cut to 5,000 captions, which was meant for COCO, so that 1,000 of Flickr30K's
  1,014 images select the model. Mended: all.
- `Augmentation.keep_words`: the augmentation may delete all words of a caption. Mended: it then stays as it is.
- `LearningRates.decay_vectors`: weight decay also pulls biases and norms to zero. Mended: matrices alone.
- `VSEInfinityConfig.image_for_each_caption`: evaluation encodes an image once for each of its captions, five times the
  work, and no number changes. Mended: once.

An image that loses all its regions to the augmentation (one in 10^25 of those with 36) ends the published code with an
error; here it keeps them all under either protocol.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retrieval.gpo import GPO
from retrieval.model import RetrievalModel


@dataclass(frozen=True, kw_only=True)
class VSEInfinityConfig:
    """The model's sizes; the defaults are the published ones.

    Args:
        embed_dim: width D of the common space.
        hidden_dim: hidden width of the region encoder's MLP.
        text_projection: whether a linear map takes BERT's hidden states to `embed_dim`. False: they have that width
            themselves, as behind LST and UniPT with `output_dim`, whose last map takes its place (prior work).
        text_buckets: groups of similar length in which the sentences of a batch go through BERT, each padded to its own
            longest: the same outputs, and less work on padding.
        padding_in_statistics: whether the zero rows that pad a batch count in the batch norm's statistics, as in the
            published code.
        image_for_each_caption: whether evaluation encodes an image once for each of its captions, likewise.
    """

    embed_dim: int = 1024
    hidden_dim: int = 512
    text_projection: bool = True
    text_buckets: int = 1
    padding_in_statistics: bool = False
    image_for_each_caption: bool = False

    def __post_init__(self) -> None:
        if self.text_buckets < 1:
            raise ValueError(f"model.text_buckets is {self.text_buckets}; expected at least 1, which is no grouping")


class RegionEncoder(nn.Module):
    """Region features (B, K, d_region) -> (B, D): a linear map plus an MLP with batch norm on each region, then GPO.

    Padding is no region: it enters neither the pooling nor, unless the configuration says so, the batch statistics.
    """

    def __init__(self, d_region: int, config: VSEInfinityConfig) -> None:
        super().__init__()
        self.padding_in_statistics = config.padding_in_statistics
        self.fc = nn.Linear(d_region, config.embed_dim)
        self.mlp = nn.Sequential(
            nn.Linear(d_region, config.hidden_dim),
            nn.BatchNorm1d(config.hidden_dim),
            nn.ReLU(),
            nn.Linear(config.hidden_dim, config.embed_dim),
        )
        self.pool = GPO()
        bound = sqrt(6.0) / sqrt(d_region + config.embed_dim)
        nn.init.uniform_(self.fc.weight, -bound, bound)
        nn.init.zeros_(self.fc.bias)

    def forward(self, regions: Tensor, lengths: Tensor) -> Tensor:
        real = torch.arange(regions.shape[1], device=regions.device) < lengths[:, None]  # (B, K)
        if self.padding_in_statistics:
            real = torch.ones_like(real)
        flat = regions[real]  # (number of regions that count, d_region)
        features = self.mlp(flat) + self.fc(flat)
        if bool(real.all()):
            padded = features.view(*regions.shape[:2], -1)
        else:
            padded = features.new_zeros(*regions.shape[:2], features.shape[-1])
            padded[real] = features
        return F.normalize(self.pool(padded, lengths), dim=-1)


class TextEncoder(nn.Module):
    """Token ids (B, L) -> (B, D): BERT's last hidden states, a linear map, GPO over all tokens with [CLS] and [SEP].

    Raises:
        ValueError: in the forward pass, where BERT, as an adapter left it, puts out another width than is expected.
    """

    def __init__(self, bert: nn.Module, config: VSEInfinityConfig) -> None:
        super().__init__()
        self.bert, self.buckets = bert, config.text_buckets
        self.width = cast(Any, bert.config).hidden_size if config.text_projection else config.embed_dim
        self.linear = nn.Linear(self.width, config.embed_dim) if config.text_projection else nn.Identity()
        self.pool = GPO()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        lengths = attention_mask.sum(dim=1)
        groups = by_length(lengths, self.buckets)
        if len(groups) == 1:
            return self._encode(input_ids, attention_mask, lengths)
        rows = []
        for group in groups:
            longest = int(lengths[group].max())
            rows.append(self._encode(input_ids[group, :longest], attention_mask[group, :longest], lengths[group]))
        return torch.cat(rows)[torch.cat(groups).argsort()]

    def _encode(self, input_ids: Tensor, attention_mask: Tensor, lengths: Tensor) -> Tensor:
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        if (came := hidden.shape[-1]) != self.width:
            mend = (
                "set model.text_projection=false, or leave the adapter's output_dim out"
                if isinstance(self.linear, nn.Linear)
                else f"use adapter=lst or adapter=unipt with adapter.output_dim={self.width}, or set "
                "model.text_projection=true"
            )
            raise ValueError(f"the text encoder puts out {came} channels, but the head takes {self.width}: {mend}")
        return F.normalize(self.pool(self.linear(hidden), lengths), dim=-1)


def by_length(lengths: Tensor, buckets: int) -> list[Tensor]:
    """Rows of a padded batch in at most `buckets` groups of similar length, shortest first; all in one where a tenth of
    the positions, padding included, would not be saved.

    Args:
        lengths: (B,) of the sentences.
        buckets: groups of equal size, but for a rest.
    """
    groups = list(lengths.argsort(stable=True).chunk(buckets))
    positions = sum(len(group) * int(lengths[group[-1]]) for group in groups)
    if positions > 0.9 * len(lengths) * int(lengths.max()):
        return [torch.arange(len(lengths), device=lengths.device)]
    return groups


def pad_regions(items: Sequence[np.ndarray]) -> dict[str, Tensor]:
    """Regions of several images, (K_b, d_region) each -> zero-padded regions (B, K, d_region), lengths (B,)."""
    lengths = torch.tensor([len(item) for item in items])
    regions = torch.zeros(len(items), int(lengths.max()), items[0].shape[-1])
    for row, item in zip(regions, items, strict=True):
        row[: len(item)] = torch.from_numpy(np.asarray(item, dtype=np.float32))
    return {"regions": regions, "region_lengths": lengths}


class VSEInfinity(RetrievalModel):
    """Both sides of VSE-infinity on region features.

    Args:
        bert: a BERT without pooler (transformers).
        d_region: width of a region feature; 2048 for bottom-up attention.
        config: sizes.
    """

    visual_kind = "regions"
    collate_visual = staticmethod(pad_regions)

    def __init__(self, bert: nn.Module, d_region: int, config: VSEInfinityConfig | None = None) -> None:
        super().__init__()
        config = config or VSEInfinityConfig()
        self.heads = ("image", *(["text.linear"] if config.text_projection else []), "text.pool")
        self.image = RegionEncoder(d_region, config)
        self.image_for_each_caption = config.image_for_each_caption
        self.text = TextEncoder(bert, config)

    def encode_visual(self, regions: Tensor, region_lengths: Tensor) -> Tensor:
        """Regions (B, K, d_region), `region_lengths` (B,) of them real -> unit rows (B, D)."""
        return self.image(regions, region_lengths)

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Token ids (B, L) and their mask (B, L) -> unit rows (B, D)."""
        return self.text(input_ids, attention_mask)

    def forward(
        self, regions: Tensor, region_lengths: Tensor, input_ids: Tensor, attention_mask: Tensor
    ) -> dict[str, Tensor]:
        """Matching pairs -> {"visual": (B, D), "text": (B, D)}, unit rows."""
        return {
            "visual": self.encode_visual(regions, region_lengths),
            "text": self.encode_text(input_ids, attention_mask),
        }

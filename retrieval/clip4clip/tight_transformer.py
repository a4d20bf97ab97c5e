"""The cross transformer of CLIP4Clip (tightTransf): one forward pass for each pair of a sentence and a clip.

Luo et al., CLIP4Clip, 2021, https://arxiv.org/abs/2104.08860, section 3.3.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from retrieval.clip4clip.head_block import HeadBlock, initialise, quick_gelu, start_from_text

PAIRS = 512  # pairs at a time: 14 MB of tokens at 12 frames of 512 channels, 1 GB with the graph of four blocks


class TightTransformer(nn.Module):
    """[sentence; frames] + positions -> pre-LN transformer blocks -> the score of the pair, read at the sentence.

    The score is a raw logit: nothing is normalised, and no logit scale is applied. n sentences and m clips take n m
    forward passes, so there are no embeddings to search among. Pairs are computed in blocks; in training, each block is
    computed again in the backward pass, so that memory does not grow with n m.

    Args:
        width: D, channels of a sentence's and of a frame's feature.
        max_frames: the longest clip.
        layers: number of blocks. Default: 4.
        dropout: of the tokens, in training. Default: 0.1.
    """

    def __init__(self, width: int, max_frames: int, layers: int = 4, dropout: float = 0.1) -> None:
        super().__init__()
        self.max_frames, self.dropout = max_frames, dropout
        self.positions = nn.Embedding(1 + max_frames, width)
        self.blocks = nn.ModuleList(HeadBlock(width) for _ in range(layers))
        self.pool_norm = nn.LayerNorm(width, eps=1e-12)
        self.pool = nn.Linear(width, width)
        self.score = nn.Linear(width, 1)
        initialise(self)

    def forward(self, text: Tensor, frames: Tensor) -> Tensor:
        """Score every sentence with every clip.

        Args:
            text: (n, D) sentence features.
            frames: (m, T, D) frame features, T <= `max_frames`; a row of zeros is padding.

        Returns:
            (n, m).
        """
        real = (frames != 0).any(dim=-1)
        rows = []
        for some in text.split(max(1, PAIRS // max(1, len(frames)))):
            if torch.is_grad_enabled():
                rows.append(cast(Tensor, checkpoint(self._block, some, frames, real, use_reentrant=False)))
            else:
                rows.append(self._block(some, frames, real))
        return torch.cat(rows)

    def _block(self, text: Tensor, frames: Tensor, real: Tensor) -> Tensor:
        (n, width), (m, length) = text.shape, real.shape
        sentences = text[:, None, None].expand(n, m, 1, width)
        tokens = torch.cat([sentences, frames.expand(n, m, length, width)], dim=2).flatten(0, 1)  # (n m, 1 + T, D)
        hidden = F.dropout(tokens + self.positions.weight[: 1 + length], self.dropout, self.training)
        attended = F.pad(real, (1, 0), value=True).repeat(n, 1)
        for block in self.blocks:
            hidden = block(hidden, attended)
        pooled = quick_gelu(self.pool(self.pool_norm(hidden[:, 0])))
        return self.score(pooled).view(n, m)

    def start_from_text(self, text: nn.Module) -> None:
        """See `retrieval.clip4clip.head_block.start_from_text`."""
        start_from_text(text, self.positions, self.blocks)

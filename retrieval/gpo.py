"""Generalized Pooling Operator, the pooling of VSE-infinity (Chen et al., CVPR 2021, https://arxiv.org/abs/2011.04305)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence


class GPO(nn.Module):
    """Pool a set of features by learned weights over each channel's sorted values.

    Sorted in descending order, weight 1 on the first value is max pooling and equal weights are mean pooling; a small
    bidirectional GRU over sinusoidal positions generates the weights for a set of any length. They depend on the
    length alone, not on the features, so they are computed once for each length in the batch.

    Args:
        d_position: width of the sinusoidal position encoding. Default: 32.
        d_hidden: hidden width of the GRU. Default: 32.
        temperature: of the softmax over positions. Default: 0.1.
    """

    def __init__(self, d_position: int = 32, d_hidden: int = 32, temperature: float = 0.1) -> None:
        super().__init__()
        self.d_position, self.temperature = d_position, temperature
        self.gru = nn.GRU(d_position, d_hidden, batch_first=True, bidirectional=True)
        self.score = nn.Linear(d_hidden, 1, bias=False)

    def weights(self, lengths: Tensor, size: int) -> Tensor:
        """Pooling weights for sets of `lengths` (B,) padded to `size` K: (B, K), rows sum to 1, zero on padding."""
        distinct, item = lengths.unique(return_inverse=True)
        positions = sinusoids(size, self.d_position).to(self.score.weight.device)
        with torch.autocast(positions.device.type, enabled=False):
            packed = pack_padded_sequence(
                positions.expand(len(distinct), -1, -1), distinct.cpu(), batch_first=True, enforce_sorted=False
            )
            hidden, _ = pad_packed_sequence(self.gru(packed)[0], batch_first=True, total_length=size)
            forward, backward = hidden.chunk(2, dim=-1)
            scores = self.score((forward + backward) / 2).squeeze(-1) / self.temperature  # (distinct, K)
            padding = torch.arange(size, device=scores.device) >= distinct[:, None]
            return scores.masked_fill(padding, float("-inf")).softmax(dim=-1)[item]

    def forward(self, features: Tensor, lengths: Tensor) -> Tensor:
        """Pool features (B, K, D), of which item b has `lengths[b]` >= 1 real ones, to (B, D).

        Raises:
            ValueError: if a set is empty or longer than K.
        """
        size = features.shape[1]
        if int(lengths.min()) < 1 or int(lengths.max()) > size:
            raise ValueError(
                f"lengths lie in [{int(lengths.min())}, {int(lengths.max())}], expected 1 to {size} features an item"
            )
        padding = (torch.arange(size, device=features.device) >= lengths[:, None]).unsqueeze(-1)
        lowest = torch.finfo(features.dtype).min
        # The channel last but one: each channel's values lie side by side, which is what a sort wants.
        ordered = (
            features.masked_fill(padding, lowest).transpose(1, 2).contiguous().sort(dim=-1, descending=True).values
        )
        ordered = ordered.masked_fill(padding.transpose(1, 2), 0.0)
        return (ordered @ self.weights(lengths, size).to(ordered.dtype).unsqueeze(-1)).squeeze(-1)


def sinusoids(length: int, width: int) -> Tensor:
    """Position encodings (length, width): even columns sin(pos w), odd columns cos(pos w), w = 10000^(-2j / width)."""
    frequencies = torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
    angles = torch.arange(length)[:, None] * frequencies  # (length, width / 2)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)

"""UniPT's side network: from all hidden states of a backbone to new tokens, or to one feature."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TokenFusion(nn.Module):
    r"""The form for BERT, on tokens.

    With :math:`Z_i = \mathrm{LN}(D_i h_i)`, i = 0..L, and :math:`A = Z_L`,

    .. math:: M_i = (S_i + I) Z_i, \quad S_i = \mathrm{ReLU}(A Z_i^T) \text{ with rows divided by their sum},
        \quad w = \mathrm{softmax}_{i<L}\, \mathrm{gate}(\bar A \odot \bar Z_i)

    .. math:: \mathrm{output} = U\, \mathrm{ReLU}(A + \mathrm{LN}(P \sum_{i<L} w_i M_i))

    Bars are means over the tokens. Padding is neither a column of S nor in a mean.
    """

    def __init__(self, width: int, states: int, dim: int, output_dim: int) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Sequential(nn.Linear(width, dim), nn.LayerNorm(dim)) for _ in range(states))
        self.project = nn.Sequential(nn.Linear(dim, dim), nn.LayerNorm(dim))
        self.gate = nn.Linear(dim, 1)
        self.up = nn.Linear(dim, output_dim)

    def forward(
        self, states: Sequence[Tensor], attention_mask: Tensor | None = None, *_others: Any, **_named: Any
    ) -> Tensor:
        """L + 1 hidden states (B, N, d), and the arguments of the backbone's block -> tokens (B, N, output_dim)."""
        *earlier, anchor = [down(state) for down, state in zip(self.down, states, strict=True)]
        real = real_tokens(attention_mask, anchor)
        centre = mean(anchor, real)
        gates = torch.cat([self.gate(centre * mean(z, real)) for z in earlier], dim=1)  # (B, L)
        weights = gates.softmax(dim=1)[..., None, None].unbind(dim=1)
        fused = sum(weight * (attend(anchor, z, real) + z) for weight, z in zip(weights, earlier, strict=True))
        return self.up(F.relu(anchor + self.project(fused)))


class FeatureFusion(nn.Module):
    r"""The form for CLIP, on the feature f of a tower.

    With :math:`q = Q\, \mathrm{ReLU}(f)` and :math:`Z_i = D_i\, \mathrm{ReLU}(h_i)`, i = 0..L,

    .. math:: m_i = S_i Z_i + Z_i[p], \quad S_i = \mathrm{ReLU}(q Z_i^T) \text{ divided by its sum},
        \quad w = \mathrm{softmax}_i\, \mathrm{gate}(q \odot \bar Z_i), \quad
        \mathrm{output} = f + U\, \mathrm{ReLU}(\sum_i w_i m_i)

    p is the token that CLIP pools: the class token, or the text's end. What stands after the end is padding: it is
    neither in S nor in the mean (our choice; the paper is silent).
    """

    def __init__(self, width: int, states: int, dim: int, feature: int) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Linear(width, dim) for _ in range(states))
        self.query = nn.Linear(feature, dim)
        self.gate = nn.Linear(dim, 1)
        self.up = nn.Linear(dim, feature)

    def forward(
        self, states: Sequence[Tensor], feature: Tensor, position: Tensor, real: Tensor, _mask: Tensor | None
    ) -> Tensor:
        """L + 1 hidden states (B, N, d), f (B, D), p (B,), which tokens are real (B, N) -> (B, D)."""
        query = self.query(F.relu(feature))
        tokens = [down(F.relu(state)) for down, state in zip(self.down, states, strict=True)]
        gates = torch.cat([self.gate(query * mean(z, real)) for z in tokens], dim=1)  # (B, L + 1)
        weights = gates.softmax(dim=1)[..., None].unbind(dim=1)
        batch = torch.arange(len(feature), device=feature.device)
        read = [attend(query[:, None], z, real, clamp=True)[:, 0] + z[batch, position] for z in tokens]
        return feature + self.up(F.relu(sum(weight * m for weight, m in zip(weights, read, strict=True))))


def attend(query: Tensor, keys: Tensor, real: Tensor, clamp: bool = False) -> Tensor:
    """Rows of ReLU(query keys^T), divided by their sum, times keys: (B, Q, m), (B, N, m), (B, N) -> (B, Q, m).

    The sum gets 1e-8 added, or, in CLIP's form, is at least 1e-6: as in the authors' code.
    """
    scores = F.relu(query @ keys.mT).float().masked_fill(~real[:, None], 0.0)
    total = scores.sum(dim=-1, keepdim=True)
    return (scores / (total.clamp(min=1e-6) if clamp else total + 1e-8)).to(keys.dtype) @ keys


def mean(tokens: Tensor, real: Tensor) -> Tensor:
    """(B, N, m) -> (B, m): over the real ones."""
    return tokens.masked_fill(~real[..., None], 0.0).sum(dim=1) / real.sum(dim=1, keepdim=True)


def real_tokens(mask: Tensor | None, tokens: Tensor) -> Tensor:
    """The attention mask that a layer of BERT gets -> (B, N), True where a token is no padding.

    That is None, (B, N) of 0 and 1, or (B, 1, N or 1, N), either boolean or added to the logits.
    """
    if mask is None:
        return torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    if mask.dim() == 4:
        mask = mask[:, 0, 0]  # every token may attend to the same
    return mask >= 0 if mask.is_floating_point() else mask.bool()

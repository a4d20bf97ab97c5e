"""Branches on attention that keeps q, k and v in one raw parameter, `in_proj_weight`: CLIP's blocks in open_clip.

There is no layer to put a branch on: `nn.MultiheadAttention` hands the parameter to a fused function, which also reads
`out_proj.weight` without ever calling `out_proj`. A stepwise one computes the same in separate steps: `project` gives
q, k and v, and can be overridden, and `out_proj` is called like any layer. The parameters stay where they are.
"""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from adapters.base import Branched
from adapters.extend import Extension

LEAVE_OUT = (
    "If that is how the model calls it, leave it out: targets may be a pattern that finds the other layers alone, such "
    'as targets=r"self_attn\\.(q|v)$"'
)


class StepwiseMultiheadAttention(Extension, nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` in steps."""

    def project(self, x: Tensor, rows: tuple[int, int] | None = None) -> Tensor:
        """x (B, L, D) -> q, k and v, side by side in (B, L, 3 D), or those of their channels that `rows` names."""
        weight: Tensor = self.in_proj_weight
        bias: Tensor | None = self.in_proj_bias
        if rows is not None:
            weight, bias = weight[slice(*rows)], None if bias is None else bias[slice(*rows)]
        return F.linear(x, weight, bias)

    def forward(  # type: ignore[override]  # the same parameters
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, L, D) each, or (L, B, D) without `batch_first` -> the query's shape, and the weights (B, L, S) or None.

        Raises:
            NotImplementedError: for an input without a batch, is_causal without a mask, and attention with
                `add_bias_kv` or `add_zero_attn`.
        """
        if query.dim() != 3 or (is_causal and attn_mask is None):
            raise NotImplementedError(
                "an adapted nn.MultiheadAttention takes a batch, in three dimensions, and the mask with is_causal; it "
                f"got {query.dim()} dimensions, is_causal={is_causal}. {LEAVE_OUT}"
            )
        if self.bias_k is not None or self.add_zero_attn:
            raise NotImplementedError(
                f"an adapted nn.MultiheadAttention has no add_bias_kv and no add_zero_attn. {LEAVE_OUT}"
            )
        own = query is key and key is value
        inputs = [x if self.batch_first else x.transpose(0, 1) for x in ((query,) if own else (query, key, value))]
        mask = _additive(attn_mask, query)
        if mask is not None and mask.dim() == 3:  # (B * heads, L, S)
            mask = mask.view(len(inputs[0]), self.num_heads, *mask.shape[1:])
        if key_padding_mask is not None:
            padding = _additive(key_padding_mask, query)
            assert padding is not None
            mask = padding[:, None, None, :] + (0 if mask is None else mask)
        if own:
            q, k, v = heads_of(self.project(inputs[0]), self.num_heads, 3)
        else:
            rows = [(i * self.embed_dim, (i + 1) * self.embed_dim) for i in range(3)]
            q, k, v = (
                heads_of(self.project(x, of_x), self.num_heads, 1)[0] for x, of_x in zip(inputs, rows, strict=True)
            )
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            weights = weights_of(q, k, mask, dropout)
            out = joined(weights @ v)
            weights = weights.mean(dim=1) if average_attn_weights else weights
        else:
            out = attend(q, k, v, mask, dropout)
        out = self.out_proj(out)
        return (out if self.batch_first else out.transpose(0, 1)), weights


class StepwiseAttention(Extension):
    """open_clip's own `Attention`, with the same parameters: a release after 3.3.0 uses it in every CLIP block."""

    in_proj_weight: nn.Parameter
    in_proj_bias: nn.Parameter | None

    def project(self, x: Tensor) -> Tensor:
        """x (B, L, D) -> q, k and v, side by side in (B, L, 3 D)."""
        return F.linear(x, self.in_proj_weight, self.in_proj_bias)

    def forward(
        self, x: Tensor, k_x: Tensor | None = None, v_x: Tensor | None = None, attn_mask: Tensor | None = None
    ) -> Tensor:
        """Self-attention on (B, L, D) -> (B, L, D).

        Raises:
            NotImplementedError: for cross-attention, boolean masks (open_clip's releases give them opposite meanings)
                and scaled cosine attention.
        """
        own: Any = self
        other = any(given is not None and given is not x for given in (k_x, v_x))
        if other or own.logit_scale is not None or (attn_mask is not None and not attn_mask.is_floating_point()):
            raise NotImplementedError(
                "an adapted open_clip Attention attends to its own input, under a mask that is added to the logits, "
                f"without scaled cosines. {LEAVE_OUT}"
            )
        if attn_mask is not None and attn_mask.dim() == 3:
            attn_mask = attn_mask.reshape(len(x), own.num_heads, *attn_mask.shape[1:])
        dropout = own.attn_drop.p if self.training else 0.0
        q, k, v = heads_of(self.project(x), own.num_heads, 3)
        out = attend(own.ln_q(q), own.ln_k(k), v, attn_mask, dropout, own.head_scale)
        return own.out_drop(own.out_proj(own.ln_inner(out)))


class AdaptedMultiheadAttention(Branched, StepwiseMultiheadAttention):
    """`torch.nn.MultiheadAttention` with branches on the rows of its in_proj_weight (q, k, v, in this order)."""

    def linear_map(self) -> tuple[Tensor, Tensor | None]:
        return self.in_proj_weight, self.in_proj_bias


class AdaptedInProjection(Branched, StepwiseAttention):
    """open_clip's own `Attention` with branches on the same rows."""

    def linear_map(self) -> tuple[Tensor, Tensor | None]:
        return self.in_proj_weight, self.in_proj_bias


def heads_of(x: Tensor, heads: int, parts: int) -> Tensor:
    """`parts` of q, k and v, side by side in (B, L, parts D) -> (parts, B, heads, L, D / heads)."""
    batch, length, width = x.shape
    return x.view(batch, length, parts, heads, width // (parts * heads)).permute(2, 0, 3, 1, 4)


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, head_scale: Tensor | None = None
) -> Tensor:
    """Scaled dot-product attention of q (B, heads, L, d), k and v (B, heads, S, d) -> (B, L, heads d).

    Args:
        q, k, v: by head.
        mask: added to the logits; broadcasts to (B, heads, L, S).
        dropout: probability.
        head_scale: (heads, 1, 1), factor of each head.
    """
    mask = None if mask is None else mask.to(q.dtype)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    return joined(out if head_scale is None else out * head_scale)


def weights_of(q: Tensor, k: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """The weights (B, heads, L, S) of that attention, after dropout."""
    logits = q @ k.mT / math.sqrt(q.shape[-1])
    logits = logits if mask is None else logits + mask.to(q.dtype)
    return F.dropout(logits.softmax(dim=-1), dropout)


def joined(x: Tensor) -> Tensor:
    """(B, heads, L, d) -> (B, L, heads d)."""
    return x.transpose(1, 2).flatten(2)


def _additive(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """nn.MultiheadAttention's boolean masks are True where attention is not allowed."""
    if mask is None or mask.is_floating_point():
        return mask
    return like.new_zeros(mask.shape).masked_fill(mask, float("-inf"))

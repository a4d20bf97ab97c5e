"""Branches on attention that keeps q, k and v in one raw parameter, `in_proj_weight`: CLIP's blocks in open_clip.

There is no layer to put a branch on: `nn.MultiheadAttention` hands the parameter to a fused function, which also reads
`out_proj.weight` without ever calling `out_proj`. A stepwise one computes the same in separate steps: `project` gives
q, k and v, and can be overridden, and `out_proj` is called like any layer. The parameters stay where they are.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from adapters.base import Branched
from adapters.extend import Extension


class StepwiseMultiheadAttention(Extension, nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` in steps."""

    def project(self, x: Tensor) -> Tensor:
        """x (B, L, D) -> q, k and v, side by side in (B, L, 3 D)."""
        return F.linear(x, self.in_proj_weight, self.in_proj_bias)

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
    ) -> tuple[Tensor, None]:
        """Self-attention on (B, L, D), or (L, B, D) without `batch_first` -> the same shape, and no weights.

        Raises:
            NotImplementedError: for cross-attention, attention weights, an input without a batch, is_causal without a
                mask, and attention with `add_bias_kv` or `add_zero_attn`.
        """
        if (
            need_weights
            or query is not key
            or key is not value
            or query.dim() != 3
            or (is_causal and attn_mask is None)
        ):
            raise NotImplementedError(
                "an adapted nn.MultiheadAttention attends to its own input under the mask that it gets, and returns no "
                "weights: call it with query = key = value in three dimensions, need_weights=False and an attn_mask"
            )
        if self.bias_k is not None or self.add_zero_attn:
            raise NotImplementedError("an adapted nn.MultiheadAttention has no add_bias_kv and no add_zero_attn")
        x = query if self.batch_first else query.transpose(0, 1)
        mask = _additive(attn_mask, x)
        if mask is not None and mask.dim() == 3:  # (B * heads, L, L)
            mask = mask.view(len(x), self.num_heads, *mask.shape[1:])
        if key_padding_mask is not None:
            padding = _additive(key_padding_mask, x)
            assert padding is not None
            mask = padding[:, None, None, :] + (0 if mask is None else mask)
        out = attend(self.project(x), self.num_heads, mask, self.dropout if self.training else 0.0)
        out = self.out_proj(out)
        return (out if self.batch_first else out.transpose(0, 1)), None


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
                "without scaled cosines"
            )
        if attn_mask is not None and attn_mask.dim() == 3:
            attn_mask = attn_mask.reshape(len(x), own.num_heads, *attn_mask.shape[1:])
        dropout = own.attn_drop.p if self.training else 0.0
        norms = (own.ln_q, own.ln_k)
        out = attend(self.project(x), own.num_heads, attn_mask, dropout, norms=norms, head_scale=own.head_scale)
        return own.out_drop(own.out_proj(own.ln_inner(out)))


class AdaptedMultiheadAttention(Branched, StepwiseMultiheadAttention):
    """`torch.nn.MultiheadAttention` with branches on the rows of its in_proj_weight (q, k, v, in this order)."""

    def linear_map(self) -> tuple[Tensor, Tensor | None]:
        return self.in_proj_weight, self.in_proj_bias


class AdaptedInProjection(Branched, StepwiseAttention):
    """open_clip's own `Attention` with branches on the same rows."""

    def linear_map(self) -> tuple[Tensor, Tensor | None]:
        return self.in_proj_weight, self.in_proj_bias


def attend(
    qkv: Tensor,
    heads: int,
    mask: Tensor | None,
    dropout: float,
    *,
    norms: tuple[nn.Module, nn.Module] | None = None,
    head_scale: Tensor | None = None,
) -> Tensor:
    """Scaled dot-product attention of q, k and v, side by side in (B, L, 3 D) -> (B, L, D).

    Args:
        qkv: (B, L, 3 D).
        heads: their number.
        mask: added to the logits; broadcasts to (B, heads, L, L).
        dropout: probability.
        norms: of q and k, over the width of a head.
        head_scale: (heads, 1, 1), factor of each head.
    """
    batch, length, width = qkv.shape
    q, k, v = qkv.view(batch, length, 3, heads, width // (3 * heads)).permute(2, 0, 3, 1, 4)
    if norms is not None:
        q, k = norms[0](q), norms[1](k)
    mask = None if mask is None else mask.to(q.dtype)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    if head_scale is not None:
        out = out * head_scale
    return out.transpose(1, 2).reshape(batch, length, width // 3)


def _additive(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """nn.MultiheadAttention's boolean masks are True where attention is not allowed."""
    if mask is None or mask.is_floating_point():
        return mask
    return like.new_zeros(mask.shape).masked_fill(mask, float("-inf"))

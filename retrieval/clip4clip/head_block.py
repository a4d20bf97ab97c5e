"""The pre-norm transformer block of CLIP4Clip's heads, and how heads start from CLIP's text tower.

Luo et al., CLIP4Clip, 2021, https://arxiv.org/abs/2104.08860, section 3.3.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEAD_WIDTH = 64  # channels of one attention head, as in CLIP
OPEN_CLIP = {  # our layers -> what stands before "weight" and "bias" in open_clip's `ResidualAttentionBlock`
    "ln_1": "ln_1.",
    "qkv": "attn.in_proj_",
    "out": "attn.out_proj.",
    "ln_2": "ln_2.",
    "expand": "mlp.c_fc.",
    "contract": "mlp.c_proj.",
}


class HeadBlock(nn.Module):
    """x + attention(LN(x)), then x + MLP(LN(x)).

    LayerNorm's eps is 1e-12 here, 1e-5 in the CLIP towers: the authors' code takes it from BERT. The layers have other
    names than open_clip's, under which an adapter's targets would find them: a head is new and trains as a whole.

    Args:
        width: D, a multiple of 64 or below 64.

    Raises:
        ValueError: for another width.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = max(1, width // HEAD_WIDTH)
        if width % self.heads:
            raise ValueError(f"{width} channels make no {self.heads} attention heads; use a multiple of {HEAD_WIDTH}")
        self.ln_1 = nn.LayerNorm(width, eps=1e-12)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.ln_2 = nn.LayerNorm(width, eps=1e-12)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)

    def forward(self, hidden: Tensor, real: Tensor) -> Tensor:
        """(B, T, D) and (B, T) bool, True for what may be attended to, at least one an item -> (B, T, D)."""
        batch, length, width = hidden.shape
        q, k, v = self.qkv(self.ln_1(hidden)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=real[:, None, None, :])  # (B, heads, T, 64)
        hidden = hidden + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return hidden + self.contract(quick_gelu(self.expand(self.ln_2(hidden))))

    def from_open_clip(self, block: nn.Module) -> None:
        """Copy the weights of open_clip's `ResidualAttentionBlock`, if all have the same shapes."""
        theirs, own = block.state_dict(), self.state_dict()
        weights = {}
        for name in own:
            layer, _, kind = name.rpartition(".")
            weights[name] = theirs.get(OPEN_CLIP[layer] + kind)
        if all(value is not None and value.shape == own[name].shape for name, value in weights.items()):
            self.load_state_dict(weights)


def initialise(head: nn.Module) -> None:
    """Linear maps and embeddings as in BERT: normal with deviation 0.02, biases zero. In place."""
    for module in head.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)


@torch.no_grad()
def start_from_text(text: nn.Module, positions: nn.Embedding, blocks: nn.ModuleList) -> None:
    """Copy what fits from an open_clip text transformer, as CLIP4Clip does: its positions and its first blocks.

    Of a text tower without them (a Hugging Face BERT) or of another width nothing is copied. Call it before an adapter
    changes the tower.
    """
    theirs: Any = getattr(text, "positional_embedding", None)
    if theirs is not None and theirs.shape[1] == positions.embedding_dim:
        rows = min(len(theirs), positions.num_embeddings)
        positions.weight[:rows] = theirs[:rows]
    for block, their_block in zip(blocks, getattr(getattr(text, "transformer", None), "resblocks", ()), strict=False):
        assert isinstance(block, HeadBlock)
        block.from_open_clip(their_block)


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x), the approximation of GELU that CLIP was trained with."""
    return x * torch.sigmoid(1.702 * x)

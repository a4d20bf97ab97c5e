"""The sequence transformer of CLIP4Clip (seqTransf): what lets a clip's frames know their order.

Luo et al., CLIP4Clip, 2021, https://arxiv.org/abs/2104.08860, section 3.3.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

HEAD_WIDTH = 64  # channels of one attention head, as in CLIP


class FrameTransformer(nn.Module):
    """Frame features + position embeddings -> pre-LN transformer blocks -> + the frame features.

    No dropout and no causal mask: each frame attends to all frames of its clip, and to no padding.

    Args:
        width: D, channels of a frame feature.
        max_frames: the longest clip, the number of position embeddings.
        layers: number of blocks. Default: 4.
    """

    def __init__(self, width: int, max_frames: int, layers: int = 4) -> None:
        super().__init__()
        self.positions = nn.Embedding(max_frames, width)
        self.blocks = nn.ModuleList(FrameBlock(width) for _ in range(layers))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.MultiheadAttention):
                nn.init.normal_(module.in_proj_weight, std=0.02)
        nn.init.normal_(self.positions.weight, std=0.02)

    def forward(self, frames: Tensor, frame_mask: Tensor) -> Tensor:
        """Let frames attend to each other.

        Args:
            frames: (B, T, D) frame features.
            frame_mask: (B, T) bool, True for real frames. An item may have none.

        Returns:
            (B, T, D); rows of padding mean nothing, and are finite.

        Raises:
            ValueError: T is more than `max_frames`.
        """
        length = frames.shape[1]
        if length > self.positions.num_embeddings:
            most = self.positions.num_embeddings
            raise ValueError(f"clips have {length} frames, but max_frames is {most}; raise it, or read fewer frames")
        # The softmax over no frame at all is NaN: an item without frames attends to its padding, which nobody reads.
        padding = ~(frame_mask | ~frame_mask.any(dim=1, keepdim=True))
        hidden = frames + self.positions.weight[:length]
        for block in self.blocks:
            hidden = block(hidden, padding)
        return frames + hidden

    @torch.no_grad()
    def start_from_text(self, text: nn.Module) -> None:
        """Copy what fits from an open_clip text transformer, as CLIP4Clip does: its positions and its first blocks.

        Of a text tower without them (a Hugging Face BERT) or of another width nothing is copied. Call it before an
        adapter changes the tower.
        """
        positions = getattr(text, "positional_embedding", None)
        if positions is not None and positions.shape[1] == self.positions.embedding_dim:
            rows = min(len(positions), self.positions.num_embeddings)
            self.positions.weight[:rows] = positions[:rows]
        theirs = getattr(getattr(text, "transformer", None), "resblocks", ())
        for block, their_block in zip(self.blocks, theirs, strict=False):
            weights = their_block.state_dict()
            if _shapes(weights) == _shapes(block.state_dict()):
                block.load_state_dict(weights)


class FrameBlock(nn.Module):
    """x + attention(LN(x)), then x + MLP(LN(x)), with the parameter names of open_clip's `ResidualAttentionBlock`.

    LayerNorm's eps is 1e-12 here, 1e-5 in the CLIP towers: the authors' code takes it from BERT.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, eps=1e-12)
        self.attn = nn.MultiheadAttention(width, max(1, width // HEAD_WIDTH), batch_first=True)
        self.ln_2 = nn.LayerNorm(width, eps=1e-12)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})

    def forward(self, hidden: Tensor, padding: Tensor) -> Tensor:
        """(B, T, D) and (B, T) bool, True for padding -> (B, T, D)."""
        normed = self.ln_1(hidden)
        hidden = hidden + self.attn(normed, normed, normed, key_padding_mask=padding, need_weights=False)[0]
        return hidden + self.mlp["c_proj"](quick_gelu(self.mlp["c_fc"](self.ln_2(hidden))))


def _shapes(weights: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in weights.items()}


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x), the approximation of GELU that CLIP was trained with."""
    return x * torch.sigmoid(1.702 * x)

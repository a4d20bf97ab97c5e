"""The sequence transformer of CLIP4Clip (seqTransf): what lets a clip's frames know their order.

Luo et al., CLIP4Clip, 2021, https://arxiv.org/abs/2104.08860, section 3.3.
"""

from __future__ import annotations

from torch import Tensor, nn

from retrieval.clip4clip.head_block import HeadBlock, initialise, start_from_text


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
        self.blocks = nn.ModuleList(HeadBlock(width) for _ in range(layers))
        initialise(self)

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
        check_length(length, self.positions.num_embeddings)
        # The softmax over no frame at all is NaN: an item without frames attends to its padding, which nobody reads.
        real = frame_mask | ~frame_mask.any(dim=1, keepdim=True)
        hidden = frames + self.positions.weight[:length]
        for block in self.blocks:
            hidden = block(hidden, real)
        return frames + hidden

    def start_from_text(self, text: nn.Module) -> None:
        """See `retrieval.clip4clip.head_block.start_from_text`."""
        start_from_text(text, self.positions, self.blocks)


def check_length(length: int, most: int) -> None:
    """Raise ValueError for clips of more frames than a head takes."""
    if length > most:
        raise ValueError(f"clips have {length} frames, but max_frames is {most}; raise it, or read fewer frames")

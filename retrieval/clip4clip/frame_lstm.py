"""The sequence LSTM of CLIP4Clip (seqLSTM): frames in their order, each with what came before it.

Luo et al., CLIP4Clip, 2021, https://arxiv.org/abs/2104.08860, section 3.3.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence


class FrameLSTM(nn.Module):
    """Frame features -> a one-directional LSTM over the real frames of each clip -> + the frame features.

    Args:
        width: D, channels of a frame feature and of the LSTM's state.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width, width, batch_first=True)

    def forward(self, frames: Tensor, frame_mask: Tensor) -> Tensor:
        """Let each frame know the earlier ones.

        Args:
            frames: (B, T, D) frame features.
            frame_mask: (B, T) bool, True for real frames, which come first. An item may have none (in the authors' code
                an error of the packing).

        Returns:
            (B, T, D); on padding twice the input, the input in place of the LSTM's output as in the authors' code.

        Raises:
            ValueError: where padding comes before a real frame.
        """
        length = frames.shape[1]
        lengths = frame_mask.sum(dim=1)
        if not torch.equal(frame_mask, torch.arange(length, device=lengths.device) < lengths[:, None]):
            raise ValueError("frame_mask has padding before real frames; an LSTM needs the real frames first")
        # One step of padding where there is no frame: a pack cannot hold an empty sequence.
        packed = pack_padded_sequence(frames, lengths.clamp(min=1).cpu(), batch_first=True, enforce_sorted=False)
        with torch.autocast(frames.device.type, enabled=False):
            hidden, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True, total_length=length)
        return frames + hidden.where(frame_mask[..., None], frames)

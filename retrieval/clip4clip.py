"""CLIP4Clip: a CLIP over the frames of a clip. Luo et al. 2021, https://arxiv.org/abs/2104.08860.

    model = CLIP4Clip(clip, head="meanP")
    frames = normalise_frames(batch, clip.visual.image_mean, clip.visual.image_std)   # (B, T, 3, H, W)
    output = model(frames, frame_mask, input_ids)                # {"visual": (B, D), "text": (B, D), "logit_scale": ()}
    scores = output["logit_scale"] * output["text"] @ output["visual"].T               # (texts, clips)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from retrieval.frame_transformer import FrameTransformer

HEADS = ("meanP", "seqTransf")
SMALLEST_NORM = 1e-6  # an item without frames becomes zeros, where the authors' code gives NaN for the whole batch


class CLIP4Clip(nn.Module):
    """Frames through CLIP's image tower, an optional sequence head, and the mean over frames.

    Args:
        clip: an open_clip `CLIP` or `CustomTextCLIP`. Build this model before an adapter changes the towers.
        head: "meanP", which has no parameters and cannot see the order of frames, or "seqTransf", a `FrameTransformer`.
        max_frames: the longest clip that seqTransf can take. Default: 12.
    """

    def __init__(self, clip: nn.Module, head: str = "meanP", max_frames: int = 12) -> None:
        super().__init__()
        if head not in HEADS:
            raise ValueError(f"unknown head {head!r}; choose from {', '.join(HEADS)}")
        self.clip = clip
        self.frame_transformer: FrameTransformer | None = None
        if head == "seqTransf":
            self.frame_transformer = FrameTransformer(embedding_width(clip), max_frames)
            self.frame_transformer.start_from_text(getattr(clip, "text", clip))

    def encode_visual(self, frames: Tensor, frame_mask: Tensor) -> Tensor:
        """Embed clips.

        Frame features, the head, L2 norm of each frame, mean over the real frames, L2 norm: in this order, so a frame counts
        by its direction only.

        Args:
            frames: (B, T, 3, H, W), normalised.
            frame_mask: (B, T), nonzero for real frames. Padding is not encoded at all.

        Returns:
            (B, D) float32, unit rows; zeros for an item without frames.
        """
        mask = frame_mask.bool()
        encoded = self.clip.encode_image(frames[mask]).float()  # (real frames, D)
        features = encoded.new_zeros(*mask.shape, encoded.shape[-1])
        features[mask] = encoded
        if self.frame_transformer is not None:
            features = self.frame_transformer(features, mask).float()
        return unit(masked_mean(unit(features), mask))

    def encode_text(self, input_ids: Tensor) -> Tensor:
        """Embed sentences: (B, L) int64 token ids, padded as CLIP's tokenizer pads -> (B, D) float32, unit rows."""
        return unit(self.clip.encode_text(input_ids).float())

    def forward(self, frames: Tensor, frame_mask: Tensor, input_ids: Tensor) -> dict[str, Tensor]:
        """Embed clips and sentences. `logit_scale` is the factor of their cosines in the loss, a scalar, exponentiated."""
        return {
            "visual": self.encode_visual(frames, frame_mask),
            "text": self.encode_text(input_ids),
            "logit_scale": self.clip.logit_scale.exp().reshape(()),
        }


def normalise_frames(frames: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 frames (B, T, H, W, 3) -> float32 (B, T, 3, H, W): each channel in [0, 1], minus its `mean`, over its `std`."""
    if frames.dtype != torch.uint8 or frames.shape[-1] != 3:
        raise ValueError(f"frames are {frames.dtype} {tuple(frames.shape)}, expected torch.uint8 (B, T, H, W, 3)")
    channel = torch.tensor([mean, std], dtype=torch.float32, device=frames.device)
    return ((frames.float() / 255 - channel[0]) / channel[1]).movedim(-1, -3).contiguous()


def unit(x: Tensor) -> Tensor:
    """x / max(|x|, 1e-6) along the last dimension."""
    return functional.normalize(x, dim=-1, eps=SMALLEST_NORM)


def masked_mean(features: Tensor, mask: Tensor) -> Tensor:
    """Mean of features (B, T, D) over the positions where mask (B, T) is True: (B, D), zeros where none is."""
    total = features.masked_fill(~mask.unsqueeze(-1), 0.0).sum(dim=1)
    return total / mask.sum(dim=1, keepdim=True).clamp(min=1)


def embedding_width(clip: nn.Module) -> int:
    """D of an open_clip model."""
    if hasattr(clip, "text"):
        return clip.text.output_dim
    projection = clip.text_projection
    return projection.out_features if isinstance(projection, nn.Linear) else projection.shape[1]

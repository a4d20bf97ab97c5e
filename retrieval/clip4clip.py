"""CLIP4Clip: a CLIP over the frames of a clip. Luo et al. 2021, https://arxiv.org/abs/2104.08860.

    model = CLIP4Clip(clip, head="meanP")
    frames = normalise_frames(batch, clip.visual.image_mean, clip.visual.image_std)   # (B, T, 3, H, W)
    output = model(frames, frame_mask, input_ids)          # {"visual": (B, D), "text": (B, D), "logit_scale": ()}
    scores = output["logit_scale"] * output["text"] @ output["visual"].T               # (texts, clips)

The towers come from `retrieval.clip_towers`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from retrieval.frame_transformer import FrameTransformer
from retrieval.model import RetrievalModel

HEADS = ("meanP", "seqTransf")
HEAD_PATHS = (
    "clip.visual.head",  # of a timm tower
    "clip.visual.proj",  # of open_clip's own
    "clip.text.proj",  # of BERT
    "clip.text.text_projection",  # of open_clip's own, in its CustomTextCLIP
    "clip.text_projection",  # of open_clip's own, in its CLIP
    "clip.logit_scale",
    "frame_transformer",
)
SMALLEST_NORM = 1e-6  # an item without frames gives zeros; in the authors' code, NaN for the whole batch


class CLIP4Clip(RetrievalModel):
    """Frames through CLIP's image tower, an optional sequence head, and the mean over frames.

    Args:
        clip: an open_clip `CLIP` or `CustomTextCLIP`. Build this model before an adapter changes the towers.
        head: "meanP", which has no parameters and cannot see the order of frames, or "seqTransf", a `FrameTransformer`.
        max_frames: the longest clip that seqTransf can take. Default: 12.
    """

    visual_kind = "frames"

    def __init__(self, clip: nn.Module, head: str = "meanP", max_frames: int = 12) -> None:
        super().__init__()
        if head not in HEADS:
            raise ValueError(f"unknown head {head!r}; choose from {', '.join(HEADS)}")
        self.clip: Any = clip  # open_clip's classes share methods, not a base class
        self.width = embedding_width(clip)
        self.frame_transformer: FrameTransformer | None = None
        if head == "seqTransf":
            self.frame_transformer = FrameTransformer(self.width, max_frames)
            self.frame_transformer.start_from_text(text_tower(clip))
        own = {name for name, _ in (*self.named_modules(), *self.named_parameters())}
        self.heads = tuple(path for path in HEAD_PATHS if path in own)

    def encode_visual(self, frames: Tensor, frame_mask: Tensor) -> Tensor:
        """Embed clips.

        Frame features, the head, L2 norm of each frame, mean over the real frames, L2 norm: in this order, so that each
        frame counts by its direction only.

        Args:
            frames: (B, T, 3, H, W), normalised.
            frame_mask: (B, T), nonzero for real frames. Padding is not encoded at all.

        Returns:
            (B, D) float32, unit rows; zeros for an item without frames.
        """
        mask = frame_mask.bool()
        features = torch.zeros(*mask.shape, self.width, device=frames.device)
        if mask.any():
            features[mask] = self.clip.encode_image(frames[mask]).float()  # (real frames, D)
        if self.frame_transformer is not None:
            features = self.frame_transformer(features, mask).float()
        return unit(masked_mean(unit(features), mask))

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Embed sentences.

        Args:
            input_ids: (B, L) int64 token ids, padded with 0.
            attention_mask: ignored. BERT's mask is `input_ids != 0`, and CLIP's own text tower is causal and reads its
                feature before the padding.

        Returns:
            (B, D) float32, unit rows.
        """
        text = text_tower(self.clip)
        if hasattr(text, "positional_embedding"):  # CLIP's own text tower takes one length only
            input_ids = functional.pad(input_ids, (0, len(text.positional_embedding) - input_ids.shape[1]))
        return unit(self.clip.encode_text(input_ids).float())

    def forward(
        self, frames: Tensor, frame_mask: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Embed clips and sentences. `logit_scale`, a scalar, is the factor of their cosines in the loss."""
        return {
            "visual": self.encode_visual(frames, frame_mask),
            "text": self.encode_text(input_ids, attention_mask),
            "logit_scale": self.clip.logit_scale.exp().reshape(()),
        }

    def collate_visual(self, items: Sequence[np.ndarray]) -> dict[str, Tensor]:
        """Clips of (T_b, H, W, 3) uint8 frames -> normalised, zero-padded frames (B, T, 3, H, W), mask (B, T).

        Raises:
            ValueError: frames are not of the size that the image tower takes.
        """
        side = self.clip.visual.image_size
        expected = (side, side) if isinstance(side, int) else tuple(side)
        if wrong := next((item.shape for item in items if item.shape[1:] != (*expected, 3)), None):
            raise ValueError(
                f"frames are {wrong[1:]}, but the image tower takes {(*expected, 3)}; "
                f"let the data set and the model agree: data.size={expected[0]} model.image_size={expected[0]}"
            )
        lengths = torch.tensor([len(item) for item in items])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        frames = torch.zeros(*mask.shape, 3, *expected)
        real = torch.from_numpy(np.concatenate(items))[None]  # (1, all real frames, H, W, 3)
        frames[mask] = normalise_frames(real, self.clip.visual.image_mean, self.clip.visual.image_std)[0]
        return {"frames": frames, "frame_mask": mask}


def normalise_frames(frames: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 frames (B, T, H, W, 3) -> float32 (B, T, 3, H, W): each channel in [0, 1], minus its mean, over its std."""
    if frames.dtype != torch.uint8 or frames.ndim != 5 or frames.shape[-1] != 3:
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


def text_tower(clip: nn.Module) -> Any:
    """The text tower of an open_clip model: a module of `CustomTextCLIP`, the parts of `CLIP` itself."""
    return getattr(clip, "text", clip)


def embedding_width(clip: nn.Module) -> int:
    """D of an open_clip model."""
    if hasattr(clip, "text"):
        return text_tower(clip).output_dim
    projection: Any = clip.text_projection
    return projection.out_features if isinstance(projection, nn.Linear) else projection.shape[1]

"""CLIP4Clip: a CLIP over the frames of a clip. Luo et al. 2021, https://arxiv.org/abs/2104.08860.

    model = CLIP4Clip(clip, head="meanP")
    batch = model.collate_visual(clips)              # frames (B, T, H, W, 3) uint8, frame_mask (B, T)
    output = model(**batch, input_ids=input_ids)     # {"visual": (B, D), "text": (B, D), "logit_scale": (), ...}
    scores = output["logit_scale"] * output["text"] @ output["visual"].T               # (texts, clips)

The towers come from `retrieval.clip4clip.towers`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from retrieval.clip4clip.frame_batch import CollateFrames, normalise_frames
from retrieval.clip4clip.frame_lstm import FrameLSTM
from retrieval.clip4clip.frame_transformer import FrameTransformer, check_length
from retrieval.clip4clip.tight_transformer import TightTransformer
from retrieval.gather import gather
from retrieval.model import RetrievalModel

HEADS = ("meanP", "seqLSTM", "seqTransf", "tightTransf")
PROJECTIONS = ("head", "backbone")
CLIP_HEADS = (
    "clip.visual.head",  # of a timm tower
    "clip.visual.proj",  # of open_clip's own
    "clip.text.proj",  # of BERT
    "clip.text.text_projection",  # of open_clip's own, in its CustomTextCLIP
    "clip.text_projection",  # of open_clip's own, in its CLIP
    "clip.logit_scale",
)
OWN_HEADS = ("frame_head", "pair_scores")
LARGEST_SCALE = 100.0  # of cosines, in CLIP and in CLIP4Clip
SMALLEST_NORM = 1e-6  # an item without frames gives zeros; in the authors' code, NaN for the whole batch


class CLIP4Clip(RetrievalModel):
    """Frames through CLIP's image tower, a similarity head, and (but for tightTransf) the mean over frames.

    | head | what compares a sentence with a clip |
    |---|---|
    | meanP | the cosine with the mean over frames; no parameters, and blind to the order of frames |
    | seqLSTM | the same after a `FrameLSTM` |
    | seqTransf | the same after a `FrameTransformer` |
    | tightTransf | a `TightTransformer` over sentence and frames, for each pair |

    Args:
        clip: an open_clip `CLIP` or `CustomTextCLIP`. Build this model before an adapter changes the towers.
        head: one of the four.
        max_frames: the longest clip that seqTransf and tightTransf can take. Default: 12.
        projections: what CLIP's two projections and its logit scale are: a "head", which trains beside an adapter at
            the heads' rate, or the "backbone" (pretrained ones, as CLIP4Clip has it).
    """

    visual_kind = "frames"

    def __init__(
        self, clip: nn.Module, head: str = "meanP", max_frames: int = 12, *, projections: str = "head"
    ) -> None:
        super().__init__()
        if head not in HEADS:
            raise ValueError(f"unknown head {head!r}; choose from {', '.join(HEADS)}")
        if projections not in PROJECTIONS:
            raise ValueError(f"projections is {projections!r}; expected one of {', '.join(PROJECTIONS)}")
        self.clip: Any = clip  # open_clip's classes share methods, not a base class
        self.width = embedding_width(clip)
        self.collate_visual = CollateFrames(frame_size(clip))
        text = text_tower(clip)
        if hasattr(text, "positional_embedding"):
            self.text_length = len(text.positional_embedding)
        self.frame_head: FrameLSTM | FrameTransformer | None = None
        if head == "seqLSTM":
            self.frame_head = FrameLSTM(self.width)
        elif head == "seqTransf":
            self.frame_head = FrameTransformer(self.width, max_frames)
            self.frame_head.start_from_text(text)
        elif head == "tightTransf":
            self.pair_scores = TightTransformer(self.width, max_frames)
            self.pair_scores.start_from_text(text)
        own = {name for name, _ in (*self.named_modules(), *self.named_parameters())}
        trained = [path for path in (*CLIP_HEADS, *OWN_HEADS) if path in own]
        if head == "tightTransf":
            trained.remove("clip.logit_scale")  # its logits have no scale
        self.heads = tuple(path for path in trained if projections == "head" or path in OWN_HEADS)

    def encode_visual(self, frames: Tensor, frame_mask: Tensor) -> Tensor:
        """Embed clips.

        Frame features, the head, L2 norm of each frame, mean over the real frames, L2 norm: in this order, so that each
        frame counts by its direction only. Under tightTransf the features of the frames themselves.

        Args:
            frames: pixels (B, T, H, W, 3) uint8, or normalised already, (B, T, 3, H, W) of a floating-point type.
            frame_mask: (B, T), nonzero for real frames. Padding is not encoded at all.

        Returns:
            (B, D) in float32 at least, unit rows; zeros for an item without frames. Under tightTransf
            (B, max_frames, D), zeros on padding.
        """
        mask = frame_mask.bool()
        dtype = torch.promote_types(frames.dtype, torch.float32)
        features = torch.zeros(*mask.shape, self.width, device=frames.device, dtype=dtype)
        if mask.any():
            real = frames[mask]  # (real frames, ...)
            if real.dtype == torch.uint8:
                real = normalise_frames(real, self.clip.visual.image_mean, self.clip.visual.image_std)
            features[mask] = self.clip.encode_image(real).to(dtype)  # (real frames, D)
        if self.pair_scores is not None:
            check_length(mask.shape[1], self.pair_scores.max_frames)
            return functional.pad(features, (0, 0, 0, self.pair_scores.max_frames - mask.shape[1]))
        if self.frame_head is not None:
            features = self.frame_head(features, mask).to(dtype)
        return unit(masked_mean(unit(features), mask))

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Embed sentences.

        Args:
            input_ids: (B, L) int64 token ids, padded with 0.
            attention_mask: ignored. BERT's mask is `input_ids != 0`, and CLIP's own text tower is causal and reads its
                feature before the padding.

        Returns:
            (B, D) in float32 at least, unit rows; under tightTransf as the tower puts them out.
        """
        if self.text_length is not None:
            input_ids = functional.pad(input_ids, (0, self.text_length - input_ids.shape[1]))
        features = self.clip.encode_text(input_ids)
        features = features.to(torch.promote_types(features.dtype, torch.float32))
        return features if self.pair_scores is not None else unit(features)

    def forward(
        self, frames: Tensor, frame_mask: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Embed clips and sentences, and score their pairs where embeddings do not say (see `RetrievalModel`)."""
        output = {
            "visual": self.encode_visual(frames, frame_mask),
            "text": self.encode_text(input_ids, attention_mask),
            "valid": frame_mask.bool().any(dim=1),
        }
        if self.pair_scores is None:
            return output | {"logit_scale": self.clip.logit_scale.exp().reshape(())}
        visual, text = output["visual"], output["text"]
        everywhere = (gather(visual), gather(text)) if self.training else (visual, text)
        by_text = self.pair_scores(text, everywhere[0])
        by_visual = by_text.T if everywhere[1] is text else self.pair_scores(everywhere[1], visual).T
        return output | {"by_text": by_text, "by_visual": by_visual, "logit_scale": text.new_ones(())}

    @torch.no_grad()
    def after_step(self) -> None:
        """Keep the logit scale at 100 or below, as CLIP does; called after each step of the optimiser."""
        if self.clip.logit_scale.requires_grad:
            self.clip.logit_scale.clamp_(max=math.log(LARGEST_SCALE))


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


def frame_size(clip: nn.Module) -> tuple[int, int]:
    """(H, W) that the image tower of an open_clip model takes, in pixels."""
    tower: Any = clip.visual
    side = tower.image_size
    return (side, side) if isinstance(side, int) else tuple(side)

"""What a retrieval model is: two encoders into one space, and how its visual inputs are batched."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn


class RetrievalModel(nn.Module, ABC):
    """An image-text or video-text model. Its forward takes B matching pairs and returns a dict:

    - "visual" and "text": what the encoders put out, (B, D) unit rows
    - "logit_scale": the factor of their cosines in a cross-entropy, a scalar; may be left out
    - "valid": (B,) bool, False where an item holds nothing, a clip without frames say; may be left out
    - "by_text" and "by_visual", of a model with `pair_scores` only: the scores of this process's sentences with the
      items of all processes, in order of rank, and of its items with all sentences, (B, B times processes) each
    """

    visual_kind: str
    """What a data set's `visual` has to be: "regions" (K, d_region) or "frames" (T, H, W, 3)."""
    heads: tuple[str, ...]
    """Paths of what trains besides the adapter: all that is not a pretrained backbone."""

    def __init__(self) -> None:
        super().__init__()
        self.text_length: int | None = None
        """Tokens to pad each sentence to, where the text tower takes one length only."""
        self.pair_scores: Any = None
        """(texts, items) as the encoders put them out -> scores (n, m), of a model that compares each pair in a pass of
        its own; None where scores are inner products."""
        self.image_for_each_caption = False
        """Whether evaluation encodes an item once for each of its captions, instead of once."""

    collate_visual: Callable[[Sequence[np.ndarray]], dict[str, Tensor]]
    """Visual items of a data set -> the arguments of `encode_visual`. It is pickled where processes that load data are
    spawned, so it holds sizes, not the model."""

    encode_visual: Callable[..., Tensor]
    """A batch of visual items, as `collate_visual` gives it -> unit rows (B, D)."""

    @abstractmethod
    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Token ids (B, L) and their mask (B, L) -> unit rows (B, D)."""

"""What a retrieval model is: two encoders into one space, and how its visual inputs are batched."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor, nn


class RetrievalModel(nn.Module, ABC):
    """An image-text or video-text model. Its forward takes matching pairs: {"visual": (B, D), "text": (B, D), ...}."""

    visual_kind: str
    """What a data set's `visual` has to be: "regions" (K, d_region) or "frames" (T, H, W, 3)."""
    heads: tuple[str, ...]
    """Paths of what trains besides the adapter: all that is not a pretrained backbone."""

    @abstractmethod
    def collate_visual(self, items: Sequence[np.ndarray]) -> dict[str, Tensor]:
        """Visual items of a data set -> the arguments of `encode_visual`."""

    encode_visual: Callable[..., Tensor]
    """A batch of visual items, as `collate_visual` gives it -> unit rows (B, D)."""

    @abstractmethod
    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Token ids (B, L) and their mask (B, L) -> unit rows (B, D)."""

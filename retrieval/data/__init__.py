"""Data sets for image-text and video-text retrieval.

    >>> train = DATASETS["openmoji"](Path("data"), "train")        # doctest: +SKIP

Flickr30K, COCO and MSR-VTT are read where the user has put them. The two embedded ones need no download from a data
host. What people made in them: the drawings (OpenMoji, CC BY-SA 4.0), the names (Unicode CLDR) and the keywords
(emojilib). What is synthetic: which drawings meet, where, on which background, with which motion, and the sentences
that say so. Pictures and clips made from OpenMoji are adaptations of it and stay under CC BY-SA
4.0; see ATTRIBUTION.md.
"""

from __future__ import annotations

from typing import Any

from retrieval.data.dataset import SPLITS, RetrievalDataset
from retrieval.data.flickr30k import COCO, Flickr30K
from retrieval.data.msrvtt import MSRVTT
from retrieval.data.openmoji import OpenMojiScenes
from retrieval.data.openmoji_clips import OpenMojiClips

DATASETS: dict[str, Any] = {
    "openmoji": OpenMojiScenes,
    "openmoji_clips": OpenMojiClips,
    "msrvtt": MSRVTT,
    "flickr30k": Flickr30K,
    "coco": COCO,
}

__all__ = ["COCO", "DATASETS", "MSRVTT", "SPLITS", "Flickr30K", "OpenMojiClips", "OpenMojiScenes", "RetrievalDataset"]

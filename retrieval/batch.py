"""From a data set to training batches: pairs, augmentation, padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from retrieval.data import RetrievalDataset

PAIRINGS = ("image", "caption")


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """VSE-infinity's training augmentation; the probabilities are per region and per word.

    A chosen word (all its pieces together) is masked in half of the cases, replaced by random pieces in a tenth, and
    deleted otherwise. A set that would lose all its regions keeps them all.

    Args:
        drop_regions: probability.
        change_words: probability.
        keep_words: leave a caption that would lose all its words as it is; else it may be empty but for the special
            tokens, as in the published code.
    """

    drop_regions: float = 0.2
    change_words: float = 0.2
    keep_words: bool = True

    def __post_init__(self) -> None:
        if not (0 <= self.drop_regions < 1 and 0 <= self.change_words < 1):
            raise ValueError(f"probabilities must lie in [0, 1), but got {self}")


class Captions:
    """Every caption of a split as token ids, tokenized once.

    Args:
        captions: M sentences.
        tokenizer: a fast tokenizer of transformers.
        max_length: tokens kept, special tokens included; None keeps all.
    """

    def __init__(self, captions: Sequence[str], tokenizer: Any, max_length: int | None = None) -> None:
        encoded: Any = {"input_ids": []}
        if captions:  # of a split that holds nothing, transformers' tokenizers make an error
            encoded = tokenizer(list(captions), truncation=max_length is not None, max_length=max_length)
        self.ids: list[list[int]] = encoded["input_ids"]
        self.words: list[list[int | None]] = [encoded.word_ids(i) for i in range(len(self.ids))]
        self.mask_id: int = tokenizer.mask_token_id  # None of CLIP's, whose words are not augmented
        self.vocabulary = len(tokenizer)

    def augmented(
        self, index: int, probability: float, rng: np.random.Generator, *, keep_words: bool = True
    ) -> list[int]:
        """Token ids of caption `index` with each word masked, replaced or deleted with the given probability.

        Unless `keep_words` is off, a caption that would lose all its words stays as it is.
        """
        ids, words = self.ids[index], self.words[index]
        distinct = {word for word in words if word is not None}
        draws = {word: rng.random() for word in sorted(distinct)}
        changed: list[int] = []
        deleted = 0
        for token, word in zip(ids, words, strict=True):
            draw = 1.0 if word is None else draws[word] / probability if probability else 1.0
            if draw >= 1.0:
                changed.append(token)
            elif draw < 0.5:
                changed.append(self.mask_id)
            elif draw < 0.6:
                changed.append(int(rng.integers(self.vocabulary)))
            else:
                deleted += 1
        special = words.count(None)
        return changed if len(ids) - deleted > special or (changed and not keep_words) else ids


class TrainingPairs(Dataset):
    """Matching (visual, caption) pairs; an item depends on the seed, the epoch and its index, and on nothing else.

    Args:
        data: the training split.
        captions: its captions, tokenized.
        pairing: "image": an item is an image with one of its captions, drawn anew each epoch; "caption": an item is a
            caption with its image, as the published recipes have it.
        augmentation: or None.
        seed: of the draws.
    """

    def __init__(
        self, data: RetrievalDataset, captions: Captions, *, pairing: str, augmentation: Augmentation | None, seed: int
    ) -> None:
        if pairing not in PAIRINGS:
            raise ValueError(f"pairing is {pairing!r}; expected one of {', '.join(PAIRINGS)}")
        self.data, self.captions, self.pairing = data, captions, pairing
        self.augmentation, self.seed = augmentation, seed
        self.epoch = 0
        order = np.argsort(data.image_of_caption, kind="stable")
        counts = np.bincount(data.image_of_caption, minlength=len(data))
        if pairing == "image" and not counts.all():
            raise ValueError(f"{int((counts == 0).sum())} of {len(data)} images have no caption to train with")
        self.captions_of_image = np.split(order, np.cumsum(counts)[:-1])

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.data) if self.pairing == "image" else len(self.captions.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = np.random.default_rng((self.seed, self.epoch, index))
        if self.pairing == "image":
            image, caption = index, int(rng.choice(self.captions_of_image[index]))
        else:
            image, caption = int(self.data.image_of_caption[index]), index
        visual, tokens = self.data.visual(image), self.captions.ids[caption]
        if self.augmentation is not None:
            tokens = self.captions.augmented(
                caption, self.augmentation.change_words, rng, keep_words=self.augmentation.keep_words
            )
            if visual.ndim == 2:  # a set of regions; frames of a clip are all kept
                kept = rng.random(len(visual)) >= self.augmentation.drop_regions
                visual = visual[kept] if kept.any() else visual
        return {"visual": visual, "input_ids": tokens}


def collate_text(ids: Sequence[Sequence[int]], length: int | None = None) -> dict[str, Tensor]:
    """Token ids of several captions -> zero-padded input_ids (B, L) and attention_mask (B, L).

    L is `length`, or that of the longest caption.

    Raises:
        ValueError: for a caption of more than `length` tokens.
    """
    longest = max(map(len, ids))
    length = longest if length is None else length
    if longest > length:
        raise ValueError(f"a caption has {longest} tokens, but the text tower takes {length}; set model.max_length")
    input_ids = torch.tensor([list(row) + [0] * (length - len(row)) for row in ids])
    lengths = torch.tensor([len(row) for row in ids])
    return {"input_ids": input_ids, "attention_mask": (torch.arange(length) < lengths[:, None]).long()}


@dataclass(frozen=True)
class Collate:
    """The items of `TrainingPairs` -> what the model's forward takes.

    Args:
        visual: `RetrievalModel.collate_visual`.
        text_length: `RetrievalModel.text_length`.
    """

    visual: Callable[[Sequence[np.ndarray]], dict[str, Tensor]]
    text_length: int | None = None

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Tensor]:
        text = collate_text([item["input_ids"] for item in items], self.text_length)
        return self.visual([item["visual"] for item in items]) | text

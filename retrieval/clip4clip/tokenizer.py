"""CLIP's tokenizer behind the calls that `retrieval.batch.Captions` makes of a tokenizer of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class ClipEncoding(dict[str, list[list[int]]]):
    """{"input_ids": token ids of each sentence}; which word a token belongs to is not kept."""

    def word_ids(self, index: int) -> list[int | None]:
        return [None] * len(self["input_ids"][index])


class ClipTokenizer:
    """Sentences -> [start] tokens [end], without padding and cut to the text tower's length with [end] kept.

    CLIP has no mask token, so that VSE-infinity's augmentation of words is not for it.

    Args:
        tokenizer: open_clip's `SimpleTokenizer`, which also cleans text as CLIP does.
    """

    mask_token_id = None

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __len__(self) -> int:
        return int(self.tokenizer.vocab_size)

    def __call__(
        self, sentences: Sequence[str], *, truncation: bool = True, max_length: int | None = None
    ) -> ClipEncoding:
        longest = self.tokenizer.context_length
        rows = self.tokenizer(list(sentences), context_length=min(max_length or longest, longest))
        ends = rows.argmax(dim=1).tolist()  # [end] has the greatest id
        return ClipEncoding(input_ids=[row[: end + 1].tolist() for row, end in zip(rows, ends, strict=True)])

"""Whether an embedded data set is what its manifest says, item by item."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from retrieval.data.dataset import SPLITS, check_prepared
from retrieval.data.verification import SplitCount, Verification


def verify_embedded(
    folder: Path,
    open_split: Callable[[str], Any],
    check_item: Callable[[Any, int], str],
    *,
    sizes: str,
    captions_per_item: int,
) -> Verification:
    """Counts of each split against the manifest, and every item through `check_item`.

    Args:
        folder: of the prepared data set.
        open_split: a split's name -> the data set.
        check_item: (data set, index) -> what is wrong with an item, "" if nothing is.
        sizes: the option in the manifest that holds the items of the three splits.
        captions_per_item: sentences of each item.

    Raises:
        FileNotFoundError: the data are not prepared; the message says how to.
    """
    check_prepared(folder, folder.name, "train")
    made: Sequence[int] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["options"][sizes]
    splits, problems = [], []
    for split, items in zip(SPLITS, made, strict=True):
        expected = (items, items * captions_per_item)
        try:
            data = open_split(split)
        except (OSError, ValueError) as error:
            problems.append(f"{split}: {error}")
            splits.append(SplitCount(split, 0, 0, missing=items, published=expected))
            continue
        found = (len(data), len(data.captions))
        if found != expected:
            problems.append(
                f"{split}: {found[0]} items with {found[1]} captions, made were {expected[0]}, {expected[1]}"
            )
        wrong = []
        for index in tqdm(range(len(data)), desc=f"checking {split}", unit="item"):
            if reason := check_item(data, index):
                wrong.append(f"{split}: {reason}")
        problems += wrong
        splits.append(SplitCount(split, *found, unreadable=len(wrong), published=expected))
    return Verification(splits, problems)

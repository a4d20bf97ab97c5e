"""Recall@K both ways and Rsum of embeddings that you have: NumPy files, from whatever model.

    python scripts/evaluate_features.py images.npy texts.npy owners.npy
    python scripts/evaluate_features.py images.npy texts.npy owners.npy --folds 5 --json metrics.json

images (N, D) and texts (M, D) are any floating type and any length, cosines are taken here; owners (M,) are integers,
the row of images that each text describes. Files are mapped, not read at once; pickled ones are refused.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from mistakes import mistakes_in_one_line

from eval import chance_level, retrieval_metrics
from eval.folds import fold_metrics
from eval.inputs import caption_owners
from eval.tables import render_rows


def main(arguments: argparse.Namespace) -> None:
    if arguments.folds is not None and arguments.distractors:
        raise ValueError("--folds and --distractors do not go together: a fold is images with their own captions")
    if arguments.json and not arguments.json.resolve().parent.is_dir():
        raise FileNotFoundError(f"--json {arguments.json}: its folder does not exist")
    images, texts, owners = (read(path) for path in (arguments.images, arguments.texts, arguments.owners))
    if images.ndim == 2:  # of another shape it is refused just below
        owners = caption_owners(owners, len(images), distractors=arguments.distractors, name="owners")
    whole = retrieval_metrics(images, texts, owners, distractors=arguments.distractors)
    found = {"all": {"metrics": whole, "chance": chance_level(owners, len(images), distractors=arguments.distractors)}}
    if arguments.folds is not None:
        metrics, chance = fold_metrics(images, texts, owners, arguments.folds)
        found[f"mean of {arguments.folds} folds"] = {"metrics": metrics, "chance": chance}
    print(f"{len(images):,} images, {len(texts):,} texts")
    print(render_rows([row for label, both in found.items() for row in _rows(label, both)]))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def read(path: Path) -> np.ndarray:
    """A NumPy file, mapped.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is none, or holds Python objects.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except ValueError as error:
        raise ValueError(f"{path}: expected one array in NumPy's format, as numpy.save writes it ({error})") from error


def _rows(label: str, both: dict[str, dict[str, float]]) -> list[tuple[str, dict[str, float]]]:
    return [(label, both["metrics"]), ("  chance", both["chance"])]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, held in (("images", "(N, D)"), ("texts", "(M, D)"), ("owners", "(M,) integers")):
        parser.add_argument(name, type=Path, help=f".npy file, {held}")
    parser.add_argument("--distractors", action="store_true", help="some images are meant to have no text")
    parser.add_argument("--folds", type=int, help="also means over so many folds of images, as COCO's 1K numbers (5)")
    parser.add_argument("--json", type=Path, help="write the numbers there as well")
    given = parser.parse_args()
    with mistakes_in_one_line():
        main(given)

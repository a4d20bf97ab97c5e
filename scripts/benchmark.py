"""Measure what the parts of this suite cost on this machine, and write docs/benchmarks.

python scripts/benchmark.py regularizers
python scripts/benchmark.py regularizers --batch 8 --pairs 31 --threads 1
python scripts/benchmark.py regularizers --measures linear --output /tmp/benchmarks
python scripts/benchmark.py adapters
python scripts/benchmark.py parameters
python scripts/benchmark.py video

Times are ratios of neighbouring runs; still, give it a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from pathlib import Path

import adapters  # noqa: F401  (before timm)

DOCS = Path(__file__).parents[1] / "docs" / "benchmarks"


def main(arguments: list[str] | None = None) -> None:
    options = vars(_parser().parse_args(arguments))
    subject = import_module(f"benchmarks.{options.pop('subject')}")
    try:
        settings = subject.Settings(**options)
    except ValueError as error:
        sys.exit(f"error: {error}")
    subject.run(settings)


def _parser() -> argparse.ArgumentParser:
    import torch

    from regularizers import REGULARIZERS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    subjects = parser.add_subparsers(dest="subject", required=True, metavar="subject")
    add = subjects.add_parser(
        "regularizers",
        help="Table 6 of the ReSoRA paper: time, memory and FLOPs that each penalty adds to a step of ViT-B/16",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    ).add_argument
    add("--batch", type=int, default=4, help="images in a step; N = 197 samples each at 224 px")
    add("--naive-batch", type=int, default=1, help="images in a step with an equation as printed, for its memory")
    add("--pairs", type=int, default=15, help="steps with and without the penalty, for each row")
    add("--threads", type=int, default=torch.get_num_threads(), help="compute threads")
    add("--measures", nargs="+", choices=REGULARIZERS, default=tuple(REGULARIZERS), metavar="MEASURE", help="rows")
    add("--samples", nargs="+", type=int, default=(1576, 6304, 25216), help="of the nonlinear measure on its own")
    add("--model", default="vit_base_patch16_224", help="a timm ViT")
    add("--image-size", type=int, default=224, help="pixels")
    add("--output", type=Path, default=DOCS, help="folder for regularizers.md and regularizers.json")
    add = subjects.add_parser(
        "adapters",
        help="time, memory and FLOPs of each adapter's training step on ViT-B/16 and BERT-base",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    ).add_argument
    add("--backbones", nargs="+", choices=("vit", "bert"), default=("vit", "bert"), help="what is adapted")
    add("--methods", nargs="+", default=(), metavar="METHOD", help="rows; all that go into the backbone by default")
    add("--batch", type=int, default=4, help="images in a step, and a quarter of its sentences")
    add("--pairs", type=int, default=15, help="pairs of steps for LoRA")
    add("--peft-pairs", type=int, default=45, help="pairs of steps for LoRA against PEFT's")
    add("--few-pairs", type=int, default=5, help="pairs of steps for the other rows")
    add("--threads", type=int, default=torch.get_num_threads(), help="compute threads")
    add("--tiny", action="store_true", help="two blocks of each backbone, to try it out")
    add("--output", type=Path, default=DOCS, help="folder for adapters.md and adapters.json")
    add = subjects.add_parser(
        "training",
        help="a training step of VSE-infinity's text side: LoRA, full fine-tuning, buckets of similar length",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    ).add_argument
    add("--batch", type=int, default=32, help="sentences in a step")
    add("--pairs", type=int, default=15, help="pairs of steps for each ratio")
    add("--threads", type=int, default=torch.get_num_threads(), help="compute threads")
    add("--tiny", action="store_true", help="two layers of BERT, to try it out")
    add("--output", type=Path, default=DOCS, help="folder for training.md and training.json")
    add = subjects.add_parser(
        "parameters",
        help="trained parameters of the paper's tables, ours beside the paper's",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    ).add_argument
    add("--output", type=Path, default=DOCS, help="folder for parameters.md")
    add = subjects.add_parser(
        "video",
        help="clips read a second, from the file and from the frame cache, beside the way of CLIP4Clip's authors",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    ).add_argument
    add("--clips", type=int, default=10, help="videos, encoded for the purpose")
    add("--seconds", type=int, default=30, help="length of a video")
    add("--width", type=int, default=320, help="pixels, even")
    add("--height", type=int, default=240, help="pixels, even")
    add("--rate", type=int, default=25, help="frames a second of a video")
    add("--frames", type=int, default=12, help="frames that are kept of a clip")
    add("--size", type=int, default=224, help="pixels that they are resized to")
    add("--pairs", type=int, default=30, help="pairs of reads for each row")
    add("--threads", type=int, default=1, help="compute threads; a data loader's worker has one")
    add("--output", type=Path, default=DOCS, help="folder for video.md and video.json")
    return parser


if __name__ == "__main__":
    main()

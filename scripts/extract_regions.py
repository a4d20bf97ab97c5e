"""Region features of pictures, from torchvision's Faster R-CNN: the files that data=flickr30k and data=coco read.

    python scripts/extract_regions.py --images flickr30k-images --karpathy dataset_flickr30k.json \\
        --weights fasterrcnn_resnet50_fpn_coco.pth --output data/flickr30k
    python scripts/extract_regions.py --images coco --karpathy dataset_coco.json --ids cocoid --boxes 10 100 \\
        --weights fasterrcnn.safetensors --float16 --output data/coco

A feature is the box head's output, 1,024 numbers. A graphics card is used where torch sees one; see --device. Launched
again, a killed extraction goes on, and a second one into the same folder waits. Pictures that are missing (told at the
start) or cannot be read are left out with their captions, counted, and listed in {split}_unreadable.txt; such a split
is no longer the published one, so training then needs data.counts=any.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from mistakes import mistakes_in_one_line
from PIL import Image

from retrieval.data.flickr30k import SOURCE, read_source
from retrieval.regions.detector import BoxChoice, describe_detector, faster_rcnn, region_features
from retrieval.regions.extraction import extract
from retrieval.regions.karpathy import NUMBERS, read_karpathy
from retrieval.regions.pictures import inside, write_mapping
from retrieval.regions.writing import write_whole

WIDTH = 1024  # of fc7


def main(arguments: list[str] | None = None) -> None:
    given = parser().parse_args(arguments)
    with mistakes_in_one_line():
        extract_all(given)


def extract_all(arguments: argparse.Namespace) -> None:
    if (arguments.weights is None) != arguments.random_weights:
        raise ValueError("give the detector's --weights FILE, or --random-weights to try the command out")
    if len(arguments.boxes) > 2:
        raise ValueError(f"--boxes takes one number, or the fewest and the most, but got {arguments.boxes}")
    choice = BoxChoice(fewest=arguments.boxes[0], most=arguments.boxes[-1], score=arguments.score)
    if arguments.device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {arguments.device}, but torch sees no CUDA device; leave it out, or give cpu")
    split_file = read_karpathy(arguments.karpathy, arguments.ids)
    splits = split_file.splits
    images = [image for split in splits.values() for image in split]
    missing = [image.file for image in images if not inside(arguments.images, image.file).is_file()]
    if len(missing) == len(images):
        raise FileNotFoundError(f"none of {len(images)} pictures is in --images {arguments.images}: {missing[0]}, ...")
    if missing:
        print(
            f"{len(missing)} of {len(images)} pictures are not in {arguments.images}, {missing[0]} for one; they and "
            "their captions are left out"
        )
    output: Path = arguments.output
    model = faster_rcnn(arguments.weights, size=arguments.size).to(arguments.device)
    source = describe_detector(arguments.weights, choice, arguments.size)
    claim(output, source, [output / f"{split}_ims.npy{end}" for split in splits for end in ("", ".journal")])

    def features_of(picture: Image.Image) -> np.ndarray:
        return region_features(model, picture, choice)

    for split, described in splits.items():
        unreadable = extract(
            split,
            described,
            arguments.images,
            output,
            features_of,
            width=WIDTH,
            fixed=choice.fixed,
            half=arguments.float16,
            source=source,
        )
        print(f"{output / split}: {len(described) - len(unreadable)} images, {len(unreadable)} unreadable")
        for item in unreadable[:10]:
            print(f"  {item.file}: {item.reason}")
    if split_file.left_out:
        print(split_file.left_out_note)
    write_mapping(output, {image.number: image.file for image in images})


def claim(output: Path, source: str, files: list[Path]) -> None:
    """Say in the output where its features come from; refuse a folder whose features come from elsewhere."""
    earlier = read_source(output)
    if earlier != source and any(file.is_file() for file in files):
        raise ValueError(
            f"{output} holds features from {earlier or 'a source that it does not name'}, not from {source}; choose "
            "another --output, or delete them"
        )
    output.mkdir(parents=True, exist_ok=True)
    if earlier != source:
        write_whole(output / SOURCE, source + "\n")


def device(name: str) -> torch.device:
    try:
        return torch.device(name)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{name!r} is no device of torch; expected cpu, cuda, cuda:1, ...") from None


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = options.add_argument
    add("--images", type=Path, required=True, help="folder of the pictures")
    add("--karpathy", type=Path, required=True, help="dataset_flickr30k.json or dataset_coco.json")
    add("--ids", choices=NUMBERS, default="imgid", help="what an image's number is; default: %(default)s")
    add("--weights", type=Path, help="state dict (.pth) or .safetensors of torchvision's fasterrcnn_resnet50_fpn")
    add("--random-weights", action="store_true", help="no weights: features of no use, to try the command out")
    add("--boxes", type=int, nargs="+", default=[36], help="regions an image, or the fewest and the most; default: 36")
    add("--score", type=float, default=0.2, help="that a region beyond the fewest must reach; default: %(default)s")
    add("--size", type=int, default=800, help="pixels of a picture's shorter side; default: %(default)s")
    add("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    add("--float16", action="store_true", help="store float16: half the disk")
    add("--output", type=Path, required=True, help="folder, such as data/flickr30k")
    return options


if __name__ == "__main__":
    main()

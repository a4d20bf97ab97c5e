"""Region features from elsewhere -> the files that data=flickr30k and data=coco read; captions and splits too.

    python scripts/convert_regions.py tsv flickr30k.tsv --karpathy dataset_flickr30k.json --output data/flickr30k
    python scripts/convert_regions.py tsv trainval.tsv.* test.tsv --karpathy dataset_coco.json --ids cocoid --ragged \\
        --float16 --output data/coco
    python scripts/convert_regions.py captions --karpathy dataset_flickr30k.json --output data/flickr30k
    python scripts/convert_regions.py float16 data/flickr30k --output half/flickr30k

`tsv` reads the files of bottom-up attention, with 36 or (--ragged) 10 to 100 boxes an image, as a stream. `captions`
writes captions alone, for features that are there already: in the order of {split}_ids.txt beside them, or, where there
is none, in the split file's order, with image numbers. A feature file appears when it is complete, and a second
conversion into the same folder waits.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection
from pathlib import Path

from mistakes import mistakes_in_one_line

from retrieval.data.flickr30k import SOURCE
from retrieval.regions.bottom_up import convert
from retrieval.regions.karpathy import NUMBERS, Described, Karpathy, read_karpathy
from retrieval.regions.pictures import write_mapping
from retrieval.regions.precomputed import read_ids, write_texts
from retrieval.regions.verify import to_float16
from retrieval.regions.writing import only_writer_of, refuse_to_replace, write_whole


def main(arguments: list[str] | None = None) -> None:
    given = parser().parse_args(arguments)
    with mistakes_in_one_line():
        given.run(given)


def from_tsv(arguments: argparse.Namespace) -> None:
    split_file = read_karpathy(arguments.karpathy, arguments.ids)
    output: Path = arguments.output
    numbers = {split: [image.number for image in images] for split, images in split_file.splits.items()}
    files = ", ".join(path.name for path in arguments.tsv)
    with only_writer_of(output, [f"{split}_ims.npy" for split in split_file.splits]):
        done = convert(arguments.tsv, numbers, output, ragged=arguments.ragged, half=arguments.float16)
        write_whole(output / SOURCE, f"converted from bottom-up attention's {files}\n")
        write_captions(split_file, output)
    if done.repeated:
        print(f"{len(done.repeated)} images come again in the TSV files, the first is kept: {listed(done.repeated)}")
    if done.unused:
        print(f"{done.unused} images of the TSV files are in no split and were left out")


def captions_alone(arguments: argparse.Namespace) -> None:
    split_file = read_karpathy(arguments.karpathy, arguments.ids)
    arguments.output.mkdir(parents=True, exist_ok=True)
    refuse_to_replace(arguments.output, [f"{split}_caps.txt" for split in split_file.splits])
    files = {split: arguments.output / f"{split}_ids.txt" for split in split_file.splits}
    numbered = {split: path for split, path in files.items() if path.is_file()}
    ordered = {
        split: in_order_of(numbered[split], images) if split in numbered else images
        for split, images in split_file.splits.items()
    }
    write_captions(split_file._replace(splits=ordered), arguments.output, keep_ids=numbered)
    for split, images in split_file.splits.items():
        if left_out := len(images) - len(ordered[split]):
            print(f"{left_out} of {len(images)} images of {split} are not in {files[split].name} and were left out")


def in_order_of(path: Path, images: list[Described]) -> list[Described]:
    """Those images that an ids file names, in its order, which is that of the features beside it."""
    by_number = {image.number: image for image in images}
    numbers = read_ids(path).tolist()
    if strange := [number for number in numbers if number not in by_number]:
        raise ValueError(
            f"{path} names {len(strange)} of {len(numbers)} images that the split file does not have in this split: "
            f"{listed(strange)}; if it is all of them, they may be other numbers of these images (see --ids)"
        )
    return [by_number[number] for number in numbers]


def write_captions(split_file: Karpathy, output: Path, keep_ids: Collection[str] = ()) -> None:
    """Write the captions of all splits, and the numbers of their images but for the splits `keep_ids`."""
    for split, images in split_file.splits.items():
        numbers = None if split in keep_ids else [image.number for image in images]
        write_texts(output, split, [c for image in images for c in image.captions], numbers)
        print(f"{output / split}: {len(images)} images, {5 * len(images)} captions")
    write_mapping(output, {image.number: image.file for images in split_file.splits.values() for image in images})
    if split_file.left_out:
        print(split_file.left_out_note)


def half(arguments: argparse.Namespace) -> None:
    for path in to_float16(arguments.folder, arguments.output):
        print(f"{path}: {path.stat().st_size / 1e9:.2f} GB")


def listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:10])) + (", ..." if len(numbers) > 10 else "")


def parser() -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = whole.add_subparsers(dest="command", required=True, metavar="command")
    tsv = commands.add_parser("tsv", help="features, captions and image numbers from TSV files and a split file")
    tsv.add_argument("tsv", type=Path, nargs="+", help="files of bottom-up attention")
    tsv.add_argument("--ragged", action="store_true", help="images may have different numbers of boxes")
    tsv.add_argument("--float16", action="store_true", help="store float16: half the disk")
    tsv.set_defaults(run=from_tsv)
    captions = commands.add_parser("captions", help="captions and image numbers alone")
    captions.set_defaults(run=captions_alone)
    for command in (tsv, captions):
        command.add_argument("--karpathy", type=Path, required=True, help="dataset_flickr30k.json or dataset_coco.json")
        command.add_argument(
            "--ids",
            choices=NUMBERS,
            default="imgid",
            help="which of the split file's numbers the TSV files call image_id; default: %(default)s",
        )
    smaller = commands.add_parser("float16", help="a copy of a folder of feature files with half the size")
    smaller.add_argument("folder", type=Path, help="with ..._ims.npy files")
    smaller.set_defaults(run=half)
    for command in (tsv, captions, smaller):
        command.add_argument("--output", type=Path, required=True, help="folder, such as data/flickr30k")
    return whole


if __name__ == "__main__":
    main()

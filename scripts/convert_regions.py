"""Region features from elsewhere -> the files that data=flickr30k and data=coco read; captions and splits too.

    python scripts/convert_regions.py tsv flickr30k.tsv --karpathy dataset_flickr30k.json --output data/flickr30k
    python scripts/convert_regions.py tsv trainval.tsv.* test.tsv --karpathy dataset_coco.json --ids cocoid --ragged \\
        --float16 --output data/coco
    python scripts/convert_regions.py captions --karpathy dataset_flickr30k.json --output data/flickr30k
    python scripts/convert_regions.py float16 data/flickr30k --output half/flickr30k

`tsv` reads the files of bottom-up attention, with 36 or (--ragged) 10 to 100 boxes an image, as a stream. `captions`
writes captions and image numbers alone, for features that are there already. A feature file appears when it is
complete.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from command_line import mistakes_in_one_line

from retrieval.data.flickr30k import SOURCE
from retrieval.regions.bottom_up import convert
from retrieval.regions.karpathy import NUMBERS, Karpathy, read_karpathy
from retrieval.regions.pictures import write_mapping
from retrieval.regions.precomputed import write_texts
from retrieval.regions.verify import refuse_to_replace, to_float16


def main(arguments: list[str] | None = None) -> None:
    given = parser().parse_args(arguments)
    with mistakes_in_one_line():
        given.run(given)


def from_tsv(arguments: argparse.Namespace) -> None:
    split_file = read_karpathy(arguments.karpathy, arguments.ids)
    output: Path = arguments.output
    refuse_to_replace(output, [f"{split}_ims.npy" for split in split_file.splits])
    output.mkdir(parents=True, exist_ok=True)
    numbers = {split: [image.number for image in images] for split, images in split_file.splits.items()}
    done = convert(arguments.tsv, numbers, output, ragged=arguments.ragged, half=arguments.float16)
    files = ", ".join(path.name for path in arguments.tsv)
    (output / SOURCE).write_text(f"converted from bottom-up attention's {files}\n", encoding="utf-8")
    write_captions(split_file, output)
    if done.repeated:
        print(f"{len(done.repeated)} images come again in the TSV files, the first is kept: {listed(done.repeated)}")
    if done.unused:
        print(f"{done.unused} images of the TSV files are in no split and were left out")


def captions_alone(arguments: argparse.Namespace) -> None:
    split_file = read_karpathy(arguments.karpathy, arguments.ids)
    arguments.output.mkdir(parents=True, exist_ok=True)
    refuse_to_replace(arguments.output, [f"{split}_caps.txt" for split in split_file.splits])
    write_captions(split_file, arguments.output)


def write_captions(split_file: Karpathy, output: Path) -> None:
    for split, images in split_file.splits.items():
        write_texts(output, split, [c for image in images for c in image.captions], [image.number for image in images])
        print(f"{output / split}: {len(images)} images, {5 * len(images)} captions")
    write_mapping(output, {image.number: image.file for images in split_file.splits.values() for image in images})
    if split_file.left_out:
        print(f"{split_file.left_out} captions beyond the fifth of an image were left out, as the published files do")


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

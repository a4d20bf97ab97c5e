"""Bottom-up attention's feature files (Anderson et al., CVPR 2018) -> the format of `retrieval.regions.precomputed`.

A line is an image: image_id, image_w, image_h, num_boxes, boxes and features, tab separated, the last two little-endian
float32 in base64. Such a file has 25 GB for Flickr30K, in no particular order, so it is read twice: first for the
numbers of boxes, which say where each image belongs in the output, then for the features. The boxes themselves are left
out; the published format has no place for them.
"""

from __future__ import annotations

import base64
import binascii
import csv
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm.auto import tqdm

from retrieval.regions.feature_file import FeatureFile

COLUMNS = ("image_id", "image_w", "image_h", "num_boxes", "boxes", "features")
LONGEST_FIELD = 1 << 28  # characters; the module's own limit is 131,072, and 36 boxes need 393,216
NAMED = 5  # images that a message names


class Converted(NamedTuple):
    """What was not taken over: ids that came again (the first is kept), and how many are in no split."""

    repeated: list[int]
    unused: int


class Record(NamedTuple):
    """A line of a TSV file; `place` says where it is, for messages."""

    place: str
    number: int
    boxes: int
    features: str

    def decode(self) -> np.ndarray:
        """The features, (boxes, D) float32; raises ValueError if they are damaged."""
        try:
            stored = base64.b64decode("".join(self.features.split()), validate=True)
        except (binascii.Error, ValueError) as error:
            raise ValueError(f"{self.place}: the features of image {self.number} are no base64: {error}") from None
        values, rest = divmod(len(stored), 4)
        if rest or not values or values % self.boxes:
            raise ValueError(
                f"{self.place}: the features of image {self.number} are {len(stored)} bytes, which are not "
                f"{self.boxes} boxes of equally many float32"
            )
        return np.frombuffer(stored, dtype="<f4").reshape(self.boxes, -1)


def convert(
    sources: Sequence[Path], splits: Mapping[str, Sequence[int]], folder: Path, *, ragged: bool, half: bool
) -> Converted:
    """Write `{split}_ims.npy` (and `{split}_offsets.npy`) of each split into `folder`, atomically.

    Args:
        sources: TSV files.
        splits: prefix of the output's files -> the images' ids in the order of the output.
        folder: of the output.
        ragged: let images have different numbers of boxes.
        half: store float16.

    Raises:
        FileNotFoundError: a source does not exist.
        ValueError: an image is missing or damaged, or has another number of boxes than the rest and `ragged` is off.
    """
    wanted = {number for numbers in splits.values() for number in numbers}
    boxes, repeated, unused, width = _survey(sources, wanted)
    _check(splits, boxes, ragged=ragged)
    with ExitStack() as stack:
        files = {
            split: stack.enter_context(FeatureFile(folder / f"{split}_ims.npy", width, half=half)) for split in splits
        }
        offsets = {split: np.cumsum([0, *(boxes[number] for number in numbers)]) for split, numbers in splits.items()}
        place = {
            number: (split, int(offsets[split][position]))
            for split, numbers in splits.items()
            for position, number in enumerate(numbers)
        }
        for record in records(sources, "writing features"):
            if (target := place.pop(record.number, None)) is not None:  # popped: a second one is passed over
                split, row = target
                try:
                    files[split].write(row, record.decode())
                except ValueError as error:
                    raise ValueError(f"{record.place}: image {record.number}: {error}") from None
        for split, file in files.items():
            count, rows = len(splits[split]), int(offsets[split][-1])
            save_offsets(folder, split, offsets[split] if ragged else None)
            file.finish((rows, width) if ragged else (count, rows // count, width))
    return Converted(repeated, unused)


def save_offsets(folder: Path, split: str, offsets: np.ndarray | None) -> None:
    """Write `{split}_offsets.npy`, or, for images of one size, see to it that none is left of before."""
    path = folder / f"{split}_offsets.npy"
    if offsets is None:
        path.unlink(missing_ok=True)
    else:
        np.save(path, offsets.astype(np.int64))


def records(sources: Sequence[Path], label: str) -> Iterator[Record]:
    """Every line of the files, with a progress bar over their bytes.

    Raises:
        FileNotFoundError, ValueError: a file is missing or a line is not of this format.
    """
    if missing := [str(path) for path in sources if not path.is_file()]:
        raise FileNotFoundError(f"{', '.join(missing)} does not exist; expected TSV files of bottom-up attention")
    total = sum(path.stat().st_size for path in sources)
    with _long_fields(), tqdm(total=total, desc=label, unit="B", unit_scale=True) as bar:
        for path in sources:
            with path.open("rb") as file:

                def lines() -> Iterator[str]:
                    for line in file:
                        bar.update(len(line))
                        yield line.decode("ascii", errors="replace")

                reader = csv.reader(lines(), delimiter="\t")
                try:
                    for fields in reader:
                        if fields:
                            yield _record(fields, f"{path}, line {reader.line_num}")
                except csv.Error as error:
                    raise ValueError(f"{path}, line {reader.line_num}: {error}") from None


def _record(fields: list[str], place: str) -> Record:
    if len(fields) != len(COLUMNS):
        raise ValueError(f"{place} has {len(fields)} columns, expected {len(COLUMNS)}: {', '.join(COLUMNS)}")
    if not fields[0].isdecimal() or not fields[3].isdecimal() or int(fields[3]) < 1:
        raise ValueError(
            f"{place} begins with image_id={fields[0][:20]!r} and num_boxes={fields[3][:20]!r}, expected two numbers"
        )
    return Record(place, int(fields[0]), int(fields[3]), fields[5])


@contextmanager
def _long_fields() -> Iterator[None]:
    before = csv.field_size_limit(LONGEST_FIELD)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _survey(sources: Sequence[Path], wanted: set[int]) -> tuple[dict[int, int], list[int], int, int]:
    """Number of boxes of each wanted image, ids that come again, how many are not wanted, width of a feature."""
    boxes: dict[int, int] = {}
    repeated, unused, width = [], 0, 0
    for record in records(sources, "counting boxes"):
        if record.number not in wanted:
            unused += 1
        elif record.number in boxes:
            repeated.append(record.number)
        else:
            boxes[record.number] = record.boxes
            width = width or record.decode().shape[1]
    return boxes, repeated, unused, width


def _check(splits: Mapping[str, Sequence[int]], boxes: Mapping[int, int], *, ragged: bool) -> None:
    for split, numbers in splits.items():
        if missing := [number for number in numbers if number not in boxes]:
            raise ValueError(
                f"{len(missing)} of {len(numbers)} images of {split} are in none of the TSV files: "
                f"{_some(missing)}; if it is all of them, the files may use other ids (see --ids)"
            )
        sizes, counts = np.unique([boxes[number] for number in numbers], return_counts=True)
        if len(sizes) > 1 and not ragged:
            usual = int(sizes[counts.argmax()])
            others = [number for number in numbers if boxes[number] != usual]
            raise ValueError(
                f"{len(others)} of {len(numbers)} images of {split} have another number of boxes than {usual}: "
                f"{_some(others)}; features of that kind need --ragged"
            )


def _some(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:NAMED])) + (", ..." if len(numbers) > NAMED else "")

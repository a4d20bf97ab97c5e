"""Conversions from bottom-up attention's TSV and Karpathy's JSON, against the arrays that the test wrote into them."""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from tsv_files import SPLITS, WIDTH, regions, row, write_karpathy, write_tsv

from retrieval.regions.bottom_up import convert
from retrieval.regions.karpathy import read_karpathy
from retrieval.regions.precomputed import read_precomputed
from retrieval.regions.verify import to_float16

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import convert_regions


def test_karpathy_splits(tmp_path: Path) -> None:
    read = read_karpathy(write_karpathy(tmp_path / "flickr.json"))
    assert {split: [image.number for image in images] for split, images in read.splits.items()} == SPLITS
    assert read.name == "flickr30k" and read.left_out == 1
    assert read.splits["train"][0].captions == tuple(f"Caption {n} of 11 ." for n in range(5))
    assert read_karpathy(tmp_path / "flickr.json", "filename").splits["dev"][0][:2] == (109, "109.jpg")


def test_karpathy_coco_has_restval_in_train_and_testall(tmp_path: Path) -> None:
    read = read_karpathy(write_karpathy(tmp_path / "coco.json", "coco"))
    assert list(read.splits) == ["train", "testall", "dev"]
    assert [image.number for image in read.splits["train"]] == [11, 4]
    assert read.splits["testall"][0].file == "val2014/102.jpg"
    with pytest.raises(ValueError, match="'cocoid' is missing or unknown"):
        read_karpathy(tmp_path / "coco.json", "cocoid")


def test_karpathy_files_of_another_form_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    for content, message in (
        ("{", "does not fit the format"),
        ("[]", "does not fit the format"),
        ('{"images": []}', "'dataset' is missing"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            read_karpathy(path)
    content = json.loads(write_karpathy(path).read_text())
    content["images"][0]["sentences"].pop()
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"111\.jpg has 4 captions, expected 5 or more"):
        read_karpathy(path)
    content = json.loads(write_karpathy(path).read_text())
    content["images"][0]["sentences"][2]["raw"] = None
    content["images"][1]["sentences"][0]["raw"] = 7
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"2 captions are no text, None of 111\.jpg for one"):
        read_karpathy(path)
    content = json.loads(write_karpathy(path).read_text())
    content["images"][1]["imgid"] = 11
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"111\.jpg and 102\.jpg both have the imgid 11"):
        read_karpathy(path)


def test_tsv_in_any_order_becomes_the_published_layout(tmp_path: Path) -> None:
    first = write_tsv(tmp_path / "a.tsv", [row(n, regions(n)) for n in (9, 4, 500)])
    second = write_tsv(tmp_path / "b.tsv", [row(n, regions(n)) for n in (2, 11)] + [row(4, regions(0))])
    done = convert([first, second], SPLITS, tmp_path, ragged=False, half=False)
    assert done.repeated == [4] and done.unused == 1
    for split, numbers in SPLITS.items():
        written = np.load(tmp_path / f"{split}_ims.npy")
        assert written.dtype == np.float32
        assert np.array_equal(written, np.stack([regions(n) for n in numbers]))
    assert not list(tmp_path.glob("*.partial")) and not list(tmp_path.glob("*_offsets.npy"))


def test_ragged_and_float16(tmp_path: Path) -> None:
    sizes = {9: 10, 4: 1, 2: 7, 11: 4}
    source = write_tsv(tmp_path / "a.tsv", [row(n, regions(n, boxes)) for n, boxes in sizes.items()])
    with pytest.raises(ValueError, match=r"1 of 2 images of train have another number of boxes than 1: 11; .*--ragged"):
        convert([source], SPLITS, tmp_path, ragged=False, half=False)
    convert([source], SPLITS, tmp_path, ragged=True, half=True)
    for split, numbers in SPLITS.items():
        (tmp_path / f"{split}_caps.txt").write_text("a caption\n" * 5 * len(numbers))
        read = read_precomputed(tmp_path, split).features
        assert read.dtype == np.float16
        for mine, number in zip(read, numbers, strict=True):
            assert np.array_equal(mine, regions(number, sizes[number]).astype(np.float16))


def test_features_that_are_not_there_or_damaged_are_named(tmp_path: Path) -> None:
    good = [row(n, regions(n)) for n in (9, 2, 11)]
    with pytest.raises(ValueError, match="1 of 2 images of train are in none of the TSV files: 4;"):
        convert([write_tsv(tmp_path / "a.tsv", good)], SPLITS, tmp_path, ragged=False, half=False)
    with pytest.raises(FileNotFoundError, match=r"b\.tsv does not exist"):
        convert([tmp_path / "b.tsv"], SPLITS, tmp_path, ragged=False, half=False)
    damaged = {
        r"line 4 has 5 columns, expected 6: image_id": row(4, regions(4))[:5],
        r"line 4 begins with image_id='x'": ["x", *row(4, regions(4))[1:]],
        r"line 4: the features of image 4 are no base64": [*row(4, regions(4))[:5], "b'AAAA'"],
        r"line 4: the features of image 4 are 40 bytes, which are not 3 boxes": [
            *row(4, regions(4))[:5],
            base64.b64encode(bytes(40)).decode(),
        ],
        r"line 4: image 4: features of shape \(3, 5\) do not fit": row(4, np.zeros((3, 5), dtype="<f4")),
        r"line 4: image 4: features hold a NaN": row(4, np.full((3, WIDTH), np.nan, dtype="<f4")),
    }
    for message, bad in damaged.items():
        source = write_tsv(tmp_path / "a.tsv", [*good, bad])
        with pytest.raises(ValueError, match=message):
            convert([source], SPLITS, tmp_path, ragged=False, half=False)
    assert not list(tmp_path.glob("*_ims.npy")), "nothing that looks finished is left"


def test_float16_copy(tmp_path: Path) -> None:
    source, output = tmp_path / "a", tmp_path / "b"
    source.mkdir()
    fixed, rows = np.random.default_rng(0).random((2, 5, 3), dtype=np.float32), regions(0, 4)
    np.save(source / "dev_ims.npy", fixed)
    np.save(source / "test_ims.npy", rows)
    (source / "dev_caps.txt").write_text("a\n")
    to_float16(source, output)
    assert np.array_equal(np.load(output / "dev_ims.npy"), fixed.astype(np.float16))
    assert np.array_equal(np.load(output / "test_ims.npy"), rows.astype(np.float16))
    assert (output / "dev_caps.txt").read_text() == "a\n"
    with pytest.raises(ValueError, match=r"already holds dev_ims\.npy, test_ims\.npy"):
        to_float16(source, output)


@pytest.mark.parametrize("lines", [1, 5])
def test_captions_come_in_the_order_of_the_features_that_are_there(
    tmp_path: Path, lines: int, capsys: pytest.CaptureFixture
) -> None:
    split_file, output = write_karpathy(tmp_path / "flickr.json"), tmp_path / "flickr30k"
    output.mkdir()
    np.save(output / "train_ims.npy", np.stack([regions(4), regions(11)]))
    numbers = "".join(f"{number}\n" * lines for number in (4, 11))
    (output / "train_ids.txt").write_text(numbers)
    convert_regions.main(["captions", "--karpathy", str(split_file), "--output", str(output)])
    read = read_precomputed(output, "train")
    for number, features, caption in zip(read.ids, read.features, read.captions[::5], strict=True):
        assert np.array_equal(features, regions(number)) and caption == f"Caption 0 of {number} ."
    assert (output / "train_ids.txt").read_text() == numbers
    assert (output / "dev_ids.txt").read_text() == "9\n", "the split file's, where there are none"
    assert "_ids.txt and were left out" not in capsys.readouterr().out


def test_images_that_an_ids_file_lacks_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    split_file, output = write_karpathy(tmp_path / "flickr.json"), tmp_path / "flickr30k"
    output.mkdir()
    (output / "train_ids.txt").write_text("4\n")
    convert_regions.main(["captions", "--karpathy", str(split_file), "--output", str(output)])
    printed = capsys.readouterr().out
    assert "train: 1 images, 5 captions" in printed
    assert "1 of 2 images of train are not in train_ids.txt and were left out" in printed


def test_numbers_that_the_split_file_does_not_have_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    split_file, output = write_karpathy(tmp_path / "flickr.json"), tmp_path / "flickr30k"
    output.mkdir()
    for numbers, message in (("9\n11\n", "names 1 of 2 images"), ("4\n4\n11\n", "3 lines, expected one for each of 2")):
        (output / "train_ids.txt").write_text(numbers)
        with pytest.raises(SystemExit, match="2"):
            convert_regions.main(["captions", "--karpathy", str(split_file), "--output", str(output)])
        assert message in capsys.readouterr().err
        assert [path.name for path in output.iterdir()] == ["train_ids.txt"]


# ---- the command


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = write_tsv(tmp_path / "a.tsv", [row(n, regions(n)) for n in (9, 4, 500, 2, 11)])
    split_file, output = write_karpathy(tmp_path / "flickr.json"), tmp_path / "flickr30k"
    call = ["tsv", str(source), "--karpathy", str(split_file), "--output", str(output)]
    convert_regions.main(call)
    printed = capsys.readouterr().out
    assert "train: 2 images, 10 captions" in printed and "1 images of the TSV files are in no split" in printed
    read = read_precomputed(output, "train")
    assert np.array_equal(read.features[1], regions(4)) and read.ids.tolist() == [11, 4]
    assert read.captions[5] == "Caption 0 of 4 ."
    assert json.loads((output / "id_mapping.json").read_text())["9"] == "109.jpg"
    for again in (call, ["captions", "--karpathy", str(split_file), "--output", str(output)]):
        with pytest.raises(SystemExit, match="2"):
            convert_regions.main(again)
        message = capsys.readouterr().err
        assert "already holds" in message and len(message.strip().splitlines()) == 1
    convert_regions.main(["captions", "--karpathy", str(split_file), "--output", str(tmp_path / "texts")])
    assert (tmp_path / "texts" / "train_caps.txt").read_text() == (output / "train_caps.txt").read_text()
    convert_regions.main(["float16", str(output), "--output", str(tmp_path / "half")])
    assert read_precomputed(tmp_path / "half", "test").features.dtype == np.float16
    assert convert_regions.parser().format_help().count("python scripts/convert_regions.py ") >= 2

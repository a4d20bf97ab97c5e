"""The published file format: both layouts, sets of different sizes, float16, and files that do not fit each other."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from region_folders import features_of, write_split

from retrieval.regions.feature_file import FeatureFile
from retrieval.regions.precomputed import read_precomputed, write_precomputed
from retrieval.regions.ragged import Ragged

STATUS = Path("/proc/self/status")
needs_account = pytest.mark.skipif(
    not STATUS.is_file() or "VmHWM" not in STATUS.read_text(), reason="needs Linux's account of memory"
)


def test_round_trip(tmp_path: Path) -> None:
    features = features_of(4)
    captions = [f"caption {number}\u2028of café" for number in range(20)]
    write_precomputed(tmp_path, "dev", features, captions)
    read = read_precomputed(tmp_path, "dev")
    assert isinstance(read.features, np.memmap)
    assert np.array_equal(read.features, features) and read.captions == captions
    assert read.image_of_caption.tolist() == [0] * 5 + [1] * 5 + [2] * 5 + [3] * 5
    assert read.ids.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("repeated_ids", [False, True])
@pytest.mark.parametrize("repeated", [False, True])
def test_repeated_images_come_once(tmp_path: Path, repeated: bool, repeated_ids: bool) -> None:
    """The other layout of Flickr30K, an image's row once for each of its captions; its numbers come in either way."""
    features = features_of(4)
    write_split(tmp_path, "dev", features, first_id=70, repeated=repeated, repeated_ids=repeated_ids)
    read = read_precomputed(tmp_path, "dev")
    assert isinstance(read.features, np.memmap) and np.array_equal(read.features, features)
    assert read.image_of_caption.tolist() == [number // 5 for number in range(20)]
    assert read.ids.tolist() == [70, 71, 72, 73]


def test_one_caption_an_image(tmp_path: Path) -> None:
    write_precomputed(tmp_path, "dev", features_of(10), [str(number) for number in range(10)])
    assert read_precomputed(tmp_path, "dev").image_of_caption.tolist() == list(range(10))


def test_sets_of_different_sizes(tmp_path: Path) -> None:
    sets = [features_of(1, regions=count, seed=count)[0] for count in (10, 3, 100, 1)]
    write_split(tmp_path, "dev", sets)
    read = read_precomputed(tmp_path, "dev").features
    assert isinstance(read, Ragged) and isinstance(read.rows, np.memmap) and len(read) == 4
    assert all(np.array_equal(mine, one) for mine, one in zip(read, sets, strict=True))
    assert read.sizes.tolist() == [10, 3, 100, 1]
    assert np.array_equal(read[-1], sets[3]) and np.array_equal(read[1:][1], sets[2])


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    write_precomputed(tmp_path, "dev", np.zeros((4, 3, 8)), ["a caption"] * 19)
    with pytest.raises(ValueError, match=r"dev_caps\.txt has 19 captions and dev_ims\.npy 4 images, expected 1 or 5"):
        read_precomputed(tmp_path, "dev")
    write_precomputed(tmp_path, "dev", np.zeros((4, 8)), ["a caption"] * 20)
    with pytest.raises(ValueError, match=r"shape \(4, 8\), expected \(images, regions, dimensions\)"):
        read_precomputed(tmp_path, "dev")
    write_precomputed(tmp_path, "dev", np.zeros((4, 2, 8), dtype=np.uint8), ["a caption"] * 20)
    with pytest.raises(ValueError, match=r"dev_ims\.npy holds uint8 .*, expected floating-point .*astype"):
        read_precomputed(tmp_path, "dev")
    with pytest.raises(FileNotFoundError, match=r"test_ims\.npy does not exist"):
        read_precomputed(tmp_path, "test")


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ("0\n1\n2\n", "has 3 lines, expected one for each of 4 images or for each of their 5 captions"),
        ("0\n1\n1\n3\n", "names 1 images more than once, the first is 1"),
        ("0\n1\nx2\n3\n", "line 3: 'x2'"),
        ("0\n" * 5 + "1\n" * 4 + "2\n" * 6 + "3\n" * 5, "the 5 from line 6 on are not equal"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(tmp_path: Path, ids: str, message: str) -> None:
    write_split(tmp_path, "dev", features_of(4))
    (tmp_path / "dev_ids.txt").write_text(ids)
    with pytest.raises(ValueError, match=message):
        read_precomputed(tmp_path, "dev")


def test_repeated_images_are_recognised_with_a_nan_in_one(tmp_path: Path) -> None:
    """So that it is `verify` that finds the NaN, and not five times as many images that train."""
    features = features_of(4)
    features[0, 1, 2] = np.nan
    write_split(tmp_path, "dev", features, repeated=True, repeated_ids=True)
    assert len(read_precomputed(tmp_path, "dev").features) == 4


@pytest.mark.parametrize("offsets", [[0, 5, 5, 8], [0, 4, 9], [1, 4, 8], [[0, 8]]])
def test_offsets_that_do_not_fit_are_refused(tmp_path: Path, offsets: list) -> None:
    write_split(tmp_path, "dev", [features_of(1, regions=8)[0]])
    np.save(tmp_path / "dev_offsets.npy", np.array(offsets))
    with pytest.raises(ValueError, match=r"dev_offsets\.npy"):
        read_precomputed(tmp_path, "dev")


def test_damaged_files_are_named(tmp_path: Path) -> None:
    write_split(tmp_path, "dev", features_of(4))
    images, captions = tmp_path / "dev_ims.npy", tmp_path / "dev_caps.txt"
    whole, text = images.read_bytes(), captions.read_bytes()
    for damaged in (whole[:-10], b"version https://git-lfs.github.com/spec/v1\n", b""):
        images.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"dev_ims\.npy cannot be read as a \.npy file .*is it complete"):
            read_precomputed(tmp_path, "dev")
    images.write_bytes(whole)
    captions.write_bytes(b"caf\xe9\n" + text)
    with pytest.raises(ValueError, match=r"dev_caps\.txt is not UTF-8 text: .* at byte 3"):
        read_precomputed(tmp_path, "dev")


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path: Path) -> None:
    """As Notepad writes it."""
    write_split(tmp_path, "dev", features_of(4), [f"caption {number}" for number in range(20)])
    for kind in ("caps", "ids"):
        path = tmp_path / f"dev_{kind}.txt"
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    read = read_precomputed(tmp_path, "dev")
    assert read.captions[0] == "caption 0" and read.ids.tolist() == [0, 1, 2, 3]


# ---- memory


def megabytes(name: str) -> int:
    """Of this process in memory, mapped files included, as Linux has it: VmRSS is now, VmHWM the most so far."""
    lines = STATUS.read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) >> 10


def peak_of(work: Callable[..., Any], *arguments: object) -> tuple[Any, int]:
    """What `work` returns in a process of its own, and by how many megabytes it grew at the most."""
    fork = multiprocessing.get_context("fork")
    mine, theirs = fork.Pipe()

    def child() -> None:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the most so far is what is there now
        before = megabytes("VmRSS")  # not VmHWM: if it cannot be taken back, an early peak would hide a later one
        result = work(*arguments)
        theirs.send((result, megabytes("VmHWM") - before))

    process = fork.Process(target=child)
    process.start()
    assert mine.poll(60)
    result, grown = mine.recv()
    process.join()
    return result, grown


def read_some(folder: Path) -> tuple[int, float]:
    features = read_precomputed(folder, "train").features
    return features.nbytes >> 20, sum(float(features[image].sum()) for image in range(0, len(features), 364))


@needs_account
def test_memory_that_was_given_back_counts() -> None:
    total, grown = peak_of(lambda: int(np.ones(200 << 20, np.uint8).sum()))
    assert total == 200 << 20 and 200 <= grown < 300


@needs_account
def test_a_large_file_is_not_read_into_memory(tmp_path: Path) -> None:
    """Eight gigabytes of features (Flickr30K has as many), a hole in the file; a process of its own reads 81 images."""
    shape = (29_200, 36, 2048)
    with (tmp_path / "train_ims.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        file.truncate(file.tell() + int(np.prod(shape)) * 4)
    (tmp_path / "train_caps.txt").write_text("a caption\n" * 5 * shape[0])
    (size, total), grown = peak_of(read_some, tmp_path)
    assert size > 8192 and total == 0
    assert grown < 100, f"{grown} MB in memory of a file of {size} MB"


# ---- writing row by row


@pytest.mark.parametrize("half", [False, True])
def test_rows_written_in_any_order_are_the_array(tmp_path: Path, half: bool) -> None:
    features = features_of(3, regions=4, width=5)
    with FeatureFile(tmp_path / "a.npy", 5, half=half) as file:
        for image in (2, 0, 1):
            file.write(4 * image, features[image])
        assert not (tmp_path / "a.npy").exists()
        file.finish((3, 4, 5))
    read = np.load(tmp_path / "a.npy", mmap_mode="r", allow_pickle=False)
    assert read.dtype == ("float16" if half else "float32") and read.offset % 64 == 0
    assert np.array_equal(read, features.astype(read.dtype))
    assert not list(tmp_path.glob("*.partial"))


def test_features_that_cannot_be_stored_are_refused(tmp_path: Path) -> None:
    with FeatureFile(tmp_path / "a.npy", 2, half=True) as file:
        with pytest.raises(ValueError, match=r"beyond 65504 \(float16\)"):
            file.write(0, np.array([[1.0, 70000.0]], dtype=np.float32))
        with pytest.raises(ValueError, match="NaN"):
            file.write(0, np.array([[1.0, np.nan]], dtype=np.float32))
        with pytest.raises(ValueError, match=r"shape \(1, 3\) do not fit a file of 2 numbers a region"):
            file.write(0, np.zeros((1, 3), dtype=np.float32))
    assert [path.name for path in tmp_path.iterdir()] == ["a.npy.partial"]

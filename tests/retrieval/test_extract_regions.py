"""Region features of many pictures: across kills and broken files."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest
from pictures import Killed, killed_while_writing, picture, write_pictures
from PIL import Image

from retrieval.regions.extraction import extract
from retrieval.regions.karpathy import Described
from retrieval.regions.pictures import inside
from retrieval.regions.precomputed import read_precomputed


def described(count: int, first: int = 0) -> list[Described]:
    captions = [tuple(f"caption {n} of {number}" for n in range(5)) for number in range(first, first + count)]
    return [Described(50 + first + n, f"{first + n}.png", captions[n]) for n in range(count)]


def mean_colours(image: Image.Image) -> np.ndarray:
    """Stands in for a detector: as many regions as the picture is wide / 10, of three numbers."""
    return np.tile(np.asarray(image, dtype=np.float32).mean((0, 1)), (image.width // 10, 1))


def run_extraction(
    folder: Path, features_of: object = mean_colours, source: str = "test", first: int = 0, **options: bool
) -> list:
    settings = {"fixed": False, "half": False} | options
    images = described(6, first)
    return extract("dev", images, folder, folder, features_of, width=3, source=source, **settings)  # type: ignore[arg-type]


def interrupted(folder: Path, after: int) -> list[int]:
    """An extraction that is ended after so many pictures -> the widths of those that it had."""
    seen: list[int] = []

    def dying(image: Image.Image) -> np.ndarray:
        if len(seen) == after:
            raise KeyboardInterrupt
        seen.append(image.width)
        return mean_colours(image)

    with pytest.raises(KeyboardInterrupt):
        run_extraction(folder, dying)
    return seen


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return write_pictures(tmp_path)


def test_a_killed_extraction_goes_on_and_gives_the_same_file(pictures: Path) -> None:
    seen = interrupted(pictures, after=3)
    assert not (pictures / "dev_ims.npy").exists()
    journal = pictures / "dev_ims.npy.journal"
    journal.write_text(journal.read_text() + '{"number": 53, "bo')  # killed in the middle of a line
    with pytest.raises(ValueError, match=r"was begun with .*'source': 'test'.* not with .*'source': 'other'"):
        run_extraction(pictures, source="other")
    later: list[int] = []
    run_extraction(pictures, lambda image: (later.append(image.width), mean_colours(image))[1])
    assert seen + later == [20, 30, 40, 50, 60, 70], "no picture twice"
    read = read_precomputed(pictures, "dev")
    assert read.ids.tolist() == [50, 51, 52, 53, 54, 55] and not journal.exists()
    for number, features in enumerate(read.features):
        with Image.open(pictures / f"{number}.png") as image:
            assert np.array_equal(features, mean_colours(image))
    assert run_extraction(pictures, lambda _: pytest.fail("extracted again")) == [], "what is finished is left alone"


def test_regions_that_never_reached_the_disk_are_extracted_again(pictures: Path) -> None:
    interrupted(pictures, after=4)
    partial = pictures / "dev_ims.npy.partial"
    partial.write_bytes(partial.read_bytes()[:-8])
    run_extraction(pictures)
    with Image.open(pictures / "3.png") as image:
        assert np.array_equal(read_precomputed(pictures, "dev").features[3], mean_colours(image))


def test_another_list_of_pictures_is_refused(pictures: Path) -> None:
    """Of equal length: the first regions would become those of other pictures."""
    for number in (6, 7):
        picture(number).save(pictures / f"{number}.png")

    interrupted(pictures, after=3)
    with pytest.raises(ValueError, match=r"was begun with .*'pictures'.*give the split file .* or delete it"):
        run_extraction(pictures, first=2)
    run_extraction(pictures)
    with pytest.raises(ValueError, match=r"holds other pictures than the 6 .* dev_ids\.txt .* give the split file"):
        run_extraction(pictures, first=2)
    assert read_precomputed(pictures, "dev").ids.tolist() == list(range(50, 56))


@pytest.mark.parametrize("half", [False, True])
def test_a_finished_split_keeps_its_precision(pictures: Path, half: bool) -> None:
    run_extraction(pictures, half=half)
    mine, other = ("float16", "float32") if half else ("float32", "float16")
    with pytest.raises(ValueError, match=f"holds {mine}, but {other} is asked for; ask for {mine} .*--float16"):
        run_extraction(pictures, half=not half)
    assert run_extraction(pictures, half=half) == []


def test_unreadable_pictures_are_left_out_and_listed(pictures: Path) -> None:
    (pictures / "1.png").write_bytes(b"not a picture")
    (pictures / "4.png").unlink()
    whole = (pictures / "5.png").read_bytes()
    (pictures / "5.png").write_bytes(whole[: len(whole) // 2])
    unreadable = run_extraction(pictures, lambda image: mean_colours(image)[:1], fixed=True, half=True)
    assert [item.file for item in unreadable] == ["1.png", "4.png", "5.png"]
    assert "UnidentifiedImageError" in unreadable[0].reason and "FileNotFoundError" in unreadable[1].reason
    listed = (pictures / "dev_unreadable.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in listed] == ["1.png", "4.png", "5.png"]
    read = read_precomputed(pictures, "dev")
    assert read.features.shape == (3, 1, 3) and read.features.dtype == np.float16
    assert read.ids.tolist() == [50, 52, 53] and read.captions[5] == "caption 0 of 2"
    assert run_extraction(pictures, fixed=True, half=True) == unreadable


def test_pictures_that_came_after_the_end_are_not_passed_over(pictures: Path) -> None:
    moved = (pictures / "4.png").rename(pictures / "elsewhere.png")
    (pictures / "1.png").write_bytes(b"not a picture")
    assert [item.file for item in run_extraction(pictures)] == ["1.png", "4.png"]
    assert len(run_extraction(pictures)) == 2, "neither is there"
    moved.rename(pictures / "4.png")
    with pytest.raises(ValueError, match=r"1 pictures are there now, 4\.png for one; delete .*dev_ims\.npy to extract"):
        run_extraction(pictures)
    (pictures / "dev_ims.npy").unlink()
    assert [item.file for item in run_extraction(pictures)] == ["1.png"]
    assert read_precomputed(pictures, "dev").ids.tolist() == [50, 52, 53, 54, 55]


def test_pictures_that_could_not_be_read_before_a_kill_are_tried_again(pictures: Path) -> None:
    """As when a network drive was gone for a while, and somebody saw it."""
    for number in (2, 3):
        (pictures / f"{number}.png").rename(pictures / f"away{number}.png")
    assert interrupted(pictures, after=2) == [20, 30]
    for number in (2, 3):
        (pictures / f"away{number}.png").rename(pictures / f"{number}.png")
    assert run_extraction(pictures) == []
    assert read_precomputed(pictures, "dev").ids.tolist() == [50, 51, 52, 53, 54, 55]


def test_a_second_extraction_waits_for_the_first(pictures: Path) -> None:
    begun, results = threading.Event(), list[list]()

    def slow(image: Image.Image) -> np.ndarray:
        begun.set()
        time.sleep(0.3)
        return mean_colours(image)

    first = threading.Thread(target=lambda: results.append(run_extraction(pictures, slow)))
    first.start()
    begun.wait()
    with pytest.warns(UserWarning, match=r"another process holds .*dev_ims\.npy\.lock"):
        assert run_extraction(pictures, lambda _: pytest.fail("extracted twice")) == []
    first.join()
    assert results == [[]] and len(read_precomputed(pictures, "dev").features) == 6


def test_a_journal_of_other_pictures_is_refused(pictures: Path) -> None:
    interrupted(pictures, after=3)
    journal = pictures / "dev_ims.npy.journal"
    settings, first, *others = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join([settings, first, first, *others]))
    with pytest.raises(ValueError, match=r"journal has its pictures in another order .* delete it and its \.partial"):
        run_extraction(pictures)


def test_pictures_may_be_links(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """As in a snapshot of Hugging Face's cache; a name, though, must not lead out."""
    links = tmp_path_factory.mktemp("snapshot")
    for number in range(6):
        (links / f"{number}.png").symlink_to(pictures / f"{number}.png")
    run_extraction(links)
    assert len(read_precomputed(links, "dev").features) == 6
    assert inside(links, "sub/../0.png") == links / "0.png"
    for name in ("../secret.png", "sub/../../secret.png", "/secret.png", ".."):
        with pytest.raises(ValueError, match="leads out of"):
            inside(links, name)


def test_a_second_kill_while_the_journal_is_read_loses_nothing(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = interrupted(pictures, after=3)
    journal = pictures / "dev_ims.npy.journal"
    before = journal.read_text()
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(Path, "write_text", killed_while_writing)
        run_extraction(pictures)
    assert journal.read_text() == before
    later: list[int] = []
    run_extraction(pictures, lambda image: (later.append(image.width), mean_colours(image))[1])
    assert seen + later == [20, 30, 40, 50, 60, 70]


@pytest.mark.parametrize(("value", "half"), [(np.nan, False), (np.inf, False), (70000.0, True)])
def test_the_picture_whose_features_cannot_be_stored_is_named(pictures: Path, value: float, half: bool) -> None:
    def features(image: Image.Image) -> np.ndarray:
        found = mean_colours(image)
        if image.width == 50:
            found[0, 1] = value
        return found

    for _ in range(2):
        with pytest.raises(ValueError, match=r"the regions of .*3\.png cannot be stored: features hold a NaN"):
            run_extraction(pictures, features, half=half)
    (pictures / "3.png").unlink()  # as the message says
    assert [item.file for item in run_extraction(pictures, features, half=half)] == ["3.png"]
    assert read_precomputed(pictures, "dev").ids.tolist() == [50, 51, 52, 54, 55]

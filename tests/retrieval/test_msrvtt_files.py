"""MSR-VTT's files as people have them: missing, of another form, in other folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from msrvtt_folder import SMALL, TEST, TRAIN, prepare

from retrieval.data import MSRVTT
from retrieval.data.msrvtt import check_share
from retrieval.data.msrvtt_tables import check_count, find_videos


def test_without_files_it_says_what_to_get(tmp_path: Path) -> None:
    for call in (prepare, lambda root: MSRVTT(root, "train"), lambda root: MSRVTT.verify(root)):
        with pytest.raises(FileNotFoundError) as told:
            call(tmp_path)
        for needed in ("MSRVTT_train.9k.csv", "MSRVTT_JSFUSION_test.csv", "MSRVTT_data.json", "videos/video0.mp4"):
            assert needed in str(told.value)
        assert str(tmp_path / "msrvtt") in str(told.value)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("MSRVTT_train.9k.csv", "video_id\n../../secret\n", "is no video_id"),
        ("MSRVTT_train.9k.csv", "video_id\nvideo1\nvideo1\n", "more than once, video1"),
        ("MSRVTT_train.9k.csv", "video\nvideo1\n", "expected video_id too"),
        ("MSRVTT_train.9k.csv", "video_id\nvideo1\nvideo8000\n", "in MSRVTT_JSFUSION_test.csv too, video8000"),
        ("MSRVTT_train.9k.csv", "video_id\nvideo1\nvideo66\n", "no sentence on 1 videos of the list, video66"),
        ("MSRVTT_data.json", '{"sentence": []}', "is not of the form"),
        ("MSRVTT_data.json", "[1", "is not of the form"),
        ("MSRVTT_data.json", "", r"MSRVTT_data\.json is not of the form .*Replace it with the published file"),
        ("MSRVTT_data.json", "caf\xe9", r"MSRVTT_data\.json is not of the form .*UnicodeDecodeError"),
        ("MSRVTT_train.9k.csv", "", r"MSRVTT_train\.9k\.csv is no table .*EmptyDataError.*published file"),
        ("MSRVTT_train.9k.csv", "video_id\ncaf\xe9\n", r"MSRVTT_train\.9k\.csv is no table .*UnicodeDecodeError"),
        ("MSRVTT_train.9k.csv", 'video_id\n"video1\n', r"MSRVTT_train\.9k\.csv is no table .*ParserError"),
    ],
)
def test_files_of_another_form(sound: Path, tmp_path: Path, file: str, content: str, message: str) -> None:
    shutil.copytree(sound / "msrvtt", tmp_path / "msrvtt")
    (tmp_path / "msrvtt" / file).write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=message):
        MSRVTT(tmp_path, "train", **{**SMALL, "validation": 1})


def test_captions_that_are_no_text_are_refused(sound: Path, tmp_path: Path) -> None:
    """They became "None" and "nan", and trained."""
    shutil.copytree(sound / "msrvtt", tmp_path / "msrvtt")
    path = tmp_path / "msrvtt" / "MSRVTT_data.json"
    content = json.loads(path.read_text())
    of_train = [sentence for sentence in content["sentences"] if sentence["video_id"] in TRAIN]
    of_train[0]["caption"], of_train[9]["caption"] = None, 7
    del of_train[20]["caption"]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"MSRVTT_data\.json: 3 of 120 sentences are no text, one on video0 among"):
        MSRVTT(tmp_path, "train", **SMALL)


def test_published_counts(sound: Path) -> None:
    assert check_count("train.9k", (9000, 180_000)) is None
    assert check_count("train.7k", (7010, 140_200)) is None and check_count("test", (1000, 1000)) is None
    message = r"6 videos with 120 sentences, published are 9,000 with 180,000.*check_counts=false"
    with pytest.raises(ValueError, match=message):
        MSRVTT(sound, "train", size=32, validation=2)
    with pytest.raises(ValueError, match="3 videos with 3 sentences, published are 1,000 with 1,000"):
        MSRVTT(sound, "test", size=32)


@pytest.fixture
def unpacked(sound: Path, tmp_path: Path) -> Path:
    """As the published archives unpack: folders below videos/, here one for training and one for test."""
    root = tmp_path / "unpacked"
    shutil.copytree(sound / "msrvtt", root / "msrvtt", ignore=shutil.ignore_patterns("frames"))
    videos = root / "msrvtt" / "videos"
    for path in list(videos.iterdir()):
        folder = videos / "MSRVTT" / ("all" if path.stem in TRAIN else "test")
        folder.mkdir(parents=True, exist_ok=True)
        path.rename(folder / path.name)
    (videos / "__MACOSX" / "all").mkdir(parents=True)
    (videos / "__MACOSX" / "all" / f"._{TRAIN[0]}.mp4").write_bytes(b"not a video")
    return root


def test_videos_are_found_in_folders_of_folders(sound: Path, unpacked: Path) -> None:
    prepare(unpacked)
    for split in ("train", "test"):
        here, there = (MSRVTT(root, split, **SMALL) for root in (unpacked, sound))
        assert here.fingerprint == there.fingerprint
        np.testing.assert_array_equal(here.visual(1), there.visual(1))
    assert not MSRVTT.verify(unpacked, workers=0, **SMALL).problems


def test_folders_are_looked_into_where_none_lies_at_the_top(unpacked: Path, tmp_path: Path) -> None:
    videos = unpacked / "msrvtt" / "videos"
    inside = videos / "MSRVTT" / "all"
    shutil.copy(inside / f"{TRAIN[0]}.mp4", videos / f"{TRAIN[0]}.webm")  # of another size, say
    found = find_videos(videos, TRAIN)
    assert found[TRAIN[0]] == videos / f"{TRAIN[0]}.webm" and found[TRAIN[1]] == videos / f"{TRAIN[1]}.mp4"
    assert find_videos(videos, TEST)[TEST[0]] == videos / "MSRVTT" / "test" / f"{TEST[0]}.mp4"

    (tmp_path / "elsewhere").mkdir()
    (videos / "MSRVTT" / "test").rename(tmp_path / "elsewhere" / "test")
    (videos / "linked").symlink_to(tmp_path / "elsewhere")
    assert not any(path.exists() for path in find_videos(videos, TEST).values())  # nothing outside of it

    (videos / f"{TRAIN[0]}.webm").unlink()
    shutil.copytree(inside, videos / "compressed")
    with pytest.raises(
        ValueError, match=r"video3 is there 2 times, .*MSRVTT/all/video3.mp4 and .*compressed/video3.mp4"
    ):
        find_videos(videos, TRAIN)


def test_where_no_video_is_found_nothing_is_laid_out(unpacked: Path) -> None:
    folder = unpacked / "msrvtt"
    shutil.rmtree(folder / "videos" / "MSRVTT" / "test")
    message = r"test: none of 3 videos is in .*videos.*video7020\.mp4, or \.webm, \.mkv, \.avi, \.mov"
    for call in (prepare, lambda root: MSRVTT(root, "test", **SMALL)):
        with pytest.raises(FileNotFoundError, match=message) as told:
            call(unpacked)
        assert "max_unreadable" not in str(told.value)
    assert not (folder / "frames").exists()
    assert MSRVTT.verify(unpacked, workers=0, **SMALL).splits[-1].missing == 3
    with pytest.raises(ValueError, match=r"; mend them$"):  # where all are damaged, no share of them is proposed
        check_share({"video7020": "it holds no video stream"}, 1, 0.01, "test")

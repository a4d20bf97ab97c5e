"""MSR-VTT's files as people have them: missing, of another form, in other folders."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from msrvtt_folder import SMALL, prepare

from retrieval.data import MSRVTT
from retrieval.data.msrvtt_tables import check_count

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))


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


def test_published_counts(sound: Path) -> None:
    assert check_count("train.9k", (9000, 180_000)) is None
    assert check_count("train.7k", (7010, 140_200)) is None and check_count("test", (1000, 1000)) is None
    message = r"6 videos with 120 sentences, published are 9,000 with 180,000.*check_counts=false"
    with pytest.raises(ValueError, match=message):
        MSRVTT(sound, "train", size=32, validation=2)
    with pytest.raises(ValueError, match="3 videos with 3 sentences, published are 1,000 with 1,000"):
        MSRVTT(sound, "test", size=32)

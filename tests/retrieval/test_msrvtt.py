"""MSR-VTT on small files of the published form: real videos, some of them damaged."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from msrvtt_folder import SENTENCES, SMALL, TEST, TRAIN, prepare
from video_files import numbers

from retrieval.batch import Captions, TrainingPairs
from retrieval.data import MSRVTT, SPLITS
from retrieval.data.msrvtt_tables import carve_validation
from retrieval.video.reading import Reading

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from command_line import compose


def test_splits(sound: Path) -> None:
    train, validation, test = (MSRVTT(sound, split, **SMALL) for split in SPLITS)
    assert (len(train), len(validation), len(test)) == (4, 2, 3)
    assert set(train.video_ids) | set(validation.video_ids) == set(TRAIN)
    assert not set(train.video_ids) & set(validation.video_ids)
    assert [video for video in TRAIN if video in train.video_ids] == train.video_ids
    assert (len(train.captions), len(validation.captions)) == (4 * 20, 2)
    for data in (train, validation):
        assert data.image_of_caption.dtype == np.int64
        for caption, owner in zip(data.captions, data.image_of_caption, strict=True):
            assert caption.endswith(f" of {data.video_ids[owner]}")
    assert train.captions[:20] == [f"take {take} of {train.video_ids[0]}" for take in range(20)]
    assert test.video_ids == TEST and test.captions == SENTENCES  # in the order of the file, nothing dropped
    assert test.image_of_caption.tolist() == [0, 1, 2]


def test_validation_depends_on_the_seed_alone(sound: Path) -> None:
    names = [f"video{number}" for number in range(9000)]
    chosen = carve_validation(names, 500, seed=0)
    assert len(set(chosen)) == 500 and set(carve_validation(names[::-1], 500, seed=0)) == set(chosen)
    assert chosen[:4] == ["video7", "video29", "video53", "video55"]
    assert len(set(chosen) & set(carve_validation(names, 500, seed=1))) < 60  # by chance 28
    assert carve_validation(names, 0, seed=0) == []
    for impossible in (-1, 9000):
        with pytest.raises(ValueError, match=f"validation={impossible}"):
            carve_validation(names, impossible, seed=0)
    first, again = (MSRVTT(sound, "validation", **SMALL) for _ in range(2))
    assert (first.video_ids, first.captions, first.fingerprint) == (again.video_ids, again.captions, again.fingerprint)


def test_prior_selection_is_said(sound: Path) -> None:
    options = {**SMALL, "validation": "test"}
    train, validation, test = (MSRVTT(sound, split, **options) for split in SPLITS)
    assert (validation.video_ids, validation.captions) == (test.video_ids, test.captions)
    assert sorted(train.video_ids) == sorted(TRAIN)
    assert "validation is the test split" in train.preprocessing
    assert "test split" not in MSRVTT(sound, "train", **SMALL).preprocessing


def test_all_videos_may_train(sound: Path) -> None:
    options = {**SMALL, "validation": 0}
    train, validation = (MSRVTT(sound, split, **options) for split in ("train", "validation"))
    assert (train.video_ids, len(train.captions)) == (TRAIN, 6 * 20)
    assert (len(validation), validation.captions, len(validation.fingerprint)) == (0, [], 64)
    assert [row.split for row in MSRVTT.verify(sound, workers=0, **options).splits] == ["train.9k", "test"]


def test_lists(sound: Path) -> None:
    assert set(MSRVTT(sound, "train", **SMALL, train="7k").video_ids) < set(TRAIN[:4])
    for options in ({"train": "8k"}, {"validation": "dev"}, {"max_unreadable": 2}, {"frames": 0}, {"slicing": "mid"}):
        with pytest.raises(ValueError, match="expected"):
            MSRVTT(sound, "train", **{**SMALL, **options})
    with pytest.raises(ValueError, match="train, validation, test"):
        MSRVTT(sound, "val", **SMALL)


def test_expanded_sentences_are_pairing_by_caption(sound: Path) -> None:
    data = MSRVTT(sound, "train", **SMALL)
    captions = object.__new__(Captions)
    captions.ids = [[number] for number in range(len(data.captions))]
    expanded, plain = (
        TrainingPairs(data, captions, pairing=pairing, augmentation=None, seed=0) for pairing in ("caption", "image")
    )
    assert (len(expanded), len(plain)) == (80, 4)
    assert expanded[25]["input_ids"] == [25]
    np.testing.assert_array_equal(expanded[25]["visual"], data.visual(1))


def test_frames(sound: Path) -> None:
    test = MSRVTT(sound, "test", **SMALL, frames=4)
    frames = test.visual(0)
    assert frames.dtype == np.uint8 and frames.shape == (4, 32, 32, 3)
    first = MSRVTT(sound, "test", **{**SMALL, "frames": 4, "size": 64}).visual(0)
    assert numbers(first) == [0, 48, 120, 192]  # of 194 frames at 24 a second: 9 candidates
    assert [picture.size for picture in test.thumbnails(2)] == [(32, 32)] * 2  # WebM, 40 frames


def test_the_cache_is_used_where_it_is(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "root"
    shutil.copytree(sound / "msrvtt", root / "msrvtt")
    decoded = {split: MSRVTT(root, split, **SMALL) for split in SPLITS}
    frames = {split: [data.visual(index) for index in range(len(data))] for split, data in decoded.items()}
    prints = {split: data.fingerprint for split, data in decoded.items()}
    prepare(root)
    monkeypatch.setattr(Reading, "of", None)  # nothing is decoded any more
    shutil.rmtree(root / "msrvtt" / "videos")  # nor needed
    for split in SPLITS:
        data = MSRVTT(root, split, **SMALL)
        assert data.fingerprint == prints[split]
        for index, expected in enumerate(frames[split]):
            np.testing.assert_array_equal(data.visual(index), expected)
    with pytest.raises(FileNotFoundError, match="videos not found"):
        MSRVTT(root, "test", **{**SMALL, "size": 48})


def test_without_a_cache_the_error_tells_the_command_that_writes_one(sound: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(sound / "msrvtt", root / "msrvtt", ignore=shutil.ignore_patterns("frames"))
    options = {**SMALL, "frames_per_second": None, "decode_every_epoch": False}
    with pytest.raises(
        FileNotFoundError, match=r"no frame cache holds 4 of 4 videos .*decode_every_epoch=true"
    ) as told:
        MSRVTT(root, "train", **options)
    script, *overrides = str(told.value).split("run python ")[1].split(" ; ")[0].split()
    assert script == "scripts/prepare_data.py"
    config = compose("prepare_data", overrides)
    assert (config["root"], config["data"]["name"]) == (str(root), "msrvtt")
    MSRVTT.prepare(root, root / "cache", **config["data"]["prepare"] | {"workers": 0})
    video, *others = MSRVTT(root, "train", **options).video_ids
    assert len(others) == 3

    (journal,) = (root / "msrvtt" / "frames").rglob("train.9k.items.jsonl")
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(line for line in lines if f'"{video}"' not in line))  # as a kill may leave it
    with pytest.raises(FileNotFoundError, match=rf"no frame cache holds 1 of 4 videos \({video}\)"):
        MSRVTT(root, "train", **options)


def test_no_number_of_damaged_videos_ends_a_training(damaged: Path) -> None:
    """What is found out on the way, in any process that loads data, is a warning."""
    data = MSRVTT(damaged, "test", **SMALL)
    for path in data.files.values():
        path.write_bytes(b"no video")
    with pytest.warns(UserWarning, match="1 of 3 videos cannot be read and are kept, without frames") as told:
        frames = [data.visual(index) for index in (0, 1, 2, 0, 1, 2)]
    assert len(told) == 3 and all(len(found) == 0 for found in frames)


def test_whatever_a_decoder_raises_is_the_files_fault(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = MSRVTT(sound, "test", **SMALL)
    monkeypatch.setattr(Reading, "of", lambda *_: 1 / 0)
    with pytest.warns(UserWarning, match="video7020: ZeroDivisionError: division by zero"):
        assert data.visual(0).shape == (0, 32, 32, 3)


@pytest.mark.parametrize("cached", [True, False])
def test_unreadable_videos(damaged: Path, cached: bool, capsys: pytest.CaptureFixture) -> None:
    """Known before the training: left out of it. Found in it, or of another split: an array without frames."""
    if cached:
        prepare(damaged, max_unreadable=0.5)
        printed = capsys.readouterr().out
        assert "train.9k: 4 of 6 videos have frames, 2 cannot be read: see " in printed
    options = {**SMALL, "max_unreadable": 0.5, "validation": "test"}
    with pytest.warns(UserWarning, match=r"left out of the training .*video7: there is no such file"):
        train = MSRVTT(damaged, "train", **options)
    assert train.video_ids == [video for video in TRAIN if video not in (TRAIN[4], *([TRAIN[0]] if cached else []))]
    assert len(train.captions) == 20 * len(train)
    if cached:
        assert "2 of 6 videos of train cannot be read" in train.preprocessing
        with pytest.warns(UserWarning, match="kept, without frames .*video9975: the file is empty"):
            test = MSRVTT(damaged, "test", **options)
    else:
        with pytest.warns(UserWarning, match="video3: it holds no video stream"):
            assert train.visual(0).shape == (0, 32, 32, 3)
        assert train.visual(0).shape == (0, 32, 32, 3)  # warned of once
        test = MSRVTT(damaged, "test", **options)
        with pytest.warns(UserWarning, match="video9975: the file is empty"):
            test.visual(1)
    assert len(test) == 3 and test.visual(1).shape == (0, 32, 32, 3) and test.thumbnails(1) == []
    assert len(test.visual(0)) > 0


def test_a_video_that_stalled_is_not_opened_for_its_fingerprint(damaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(damaged, max_unreadable=0.5)
    journal = next((damaged / "msrvtt" / "frames").rglob("test.items.jsonl"))
    stalled = {"clip": TEST[0], "frames": 0, "reason": "it took more than 60 s", "bytes": 5000, "sha256": ""}
    journal.write_text(journal.read_text() + json.dumps(stalled) + "\n")
    monkeypatch.setattr("retrieval.data.msrvtt.size_and_digest", None)  # no file is hashed any more
    with pytest.warns(UserWarning, match=f"{TEST[0]}: it took more than 60 s"):
        test = MSRVTT(damaged, "test", **SMALL, max_unreadable=1.0)
    assert len(test.fingerprint) == 64 and test.visual(0).shape == (0, 32, 32, 3)


def test_too_many_are_refused_by_name(damaged: Path) -> None:
    with pytest.raises(ValueError, match=r"1 of 6 videos .*max_unreadable=0\.01.*video7.*max_unreadable=0\.17"):
        MSRVTT(damaged, "train", **{**SMALL, "validation": "test"})
    with pytest.raises(ValueError, match=r"2 of 6 .*video3: it holds no video stream; video7: .*0\.34"):
        prepare(damaged)
    with pytest.raises(ValueError, match=r"test: 1 of 3 videos .*video9975: the file is empty"):
        MSRVTT(damaged, "test", **SMALL)  # told by the cache that was written all the same

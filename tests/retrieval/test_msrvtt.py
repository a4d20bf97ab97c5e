"""MSR-VTT on small files of the published form: real videos, some of them damaged."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msrvtt_folder import SENTENCES, TEST, TRAIN, write_sound
from video_files import audio_only, numbers

from retrieval.batch import Captions, TrainingPairs
from retrieval.data import MSRVTT, SPLITS
from retrieval.data.msrvtt_tables import carve_validation, check_count
from retrieval.video.reading import Reading

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from command_line import compose

SMALL: dict[str, Any] = {"size": 32, "validation": 2, "check_counts": False, "decode_every_epoch": True}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sound")
    write_sound(root)
    return root


@pytest.fixture
def damaged(sound: Path, tmp_path: Path) -> Path:
    """The same with a training video without pictures, one that is missing, and a test video of no bytes."""
    root = tmp_path / "damaged"
    shutil.copytree(sound / "msrvtt", root / "msrvtt", ignore=shutil.ignore_patterns("frames"))
    videos = root / "msrvtt" / "videos"
    audio_only(videos / f"{TRAIN[0]}.mp4")
    (videos / f"{TRAIN[4]}.mp4").unlink()
    (videos / f"{TEST[1]}.mp4").write_bytes(b"")
    return root


def prepare(root: Path, **options: Any) -> None:
    MSRVTT.prepare(root, root / "cache", workers=0, **{"size": 32, "check_counts": False, **options})


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
    for impossible in (0, 9000):
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


def test_lists(sound: Path) -> None:
    assert set(MSRVTT(sound, "train", **SMALL, train="7k").video_ids) < set(TRAIN[:4])
    for options in ({"train": "8k"}, {"validation": "dev"}, {"max_unreadable": 2}, {"frames": 0}, {"slicing": "mid"}):
        with pytest.raises(ValueError, match="expected"):
            MSRVTT(sound, "train", **{**SMALL, **options})
    with pytest.raises(ValueError, match="train, validation, test"):
        MSRVTT(sound, "val", **SMALL)


def test_published_counts(sound: Path) -> None:
    assert check_count("train.9k", (9000, 180_000)) is None
    assert check_count("train.7k", (7010, 140_200)) is None and check_count("test", (1000, 1000)) is None
    message = r"6 videos with 120 sentences, published are 9,000 with 180,000.*check_counts=false"
    with pytest.raises(ValueError, match=message):
        MSRVTT(sound, "train", size=32, validation=2)
    with pytest.raises(ValueError, match="3 videos with 3 sentences, published are 1,000 with 1,000"):
        MSRVTT(sound, "test", size=32)


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


def test_verify_of_sound_files(sound: Path) -> None:
    result = MSRVTT.verify(sound, workers=0, **SMALL)
    assert result.problems == [] and result.text().endswith("nothing is wrong")
    rows = [(each.split, each.items, each.captions, each.published) for each in result.splits]
    assert rows == [
        ("train.9k", 6, 120, (9000, 180_000)),
        ("validation, of these", 2, 2, None),
        ("test", 3, 3, (1000, 1000)),
    ]
    strict = MSRVTT.verify(sound, workers=0, **{**SMALL, "check_counts": True})
    assert len(strict.problems) == 2 and "published are 9,000" in strict.problems[0]


@pytest.mark.parametrize("decode", [False, True])
def test_verify_of_damaged_files(damaged: Path, decode: bool) -> None:
    late = damaged / "msrvtt" / "videos" / f"{TRAIN[1]}.mp4"
    content = bytearray(late.read_bytes())
    start = content.index(b"mdat") + 4
    content[start:-2000] = bytes(len(content) - 2000 - start)  # pictures lost, the index behind them whole
    late.write_bytes(content)
    result = MSRVTT.verify(damaged, workers=0, decode=decode, **SMALL)
    train, _, test = result.splits
    assert (train.missing, train.unreadable, test.missing, test.unreadable) == (1, 1 + decode, 0, 1)
    told = "\n".join(result.problems)
    for part in (
        "train.9k: video7: there is no ",
        "video3: it holds no video stream",
        "test: video9975: the file is empty",
    ):
        assert part in told
    assert (f"train.9k: {TRAIN[1]}: " in told) == decode


def test_verify_looks_at_the_cache(damaged: Path) -> None:
    prepare(damaged, max_unreadable=1)
    shutil.copy(damaged / "msrvtt" / "videos" / f"{TRAIN[1]}.mp4", damaged / "msrvtt" / "videos" / f"{TEST[1]}.mp4")
    result = MSRVTT.verify(damaged, workers=0, **SMALL)
    assert any("test: 1 videos have changed since it was written" in problem for problem in result.problems)


def test_verify_with_a_process(sound: Path) -> None:
    assert not MSRVTT.verify(sound, workers=1, time_limit=30, **SMALL).problems


def test_a_cache_that_lost_its_frames_is_told_and_laid_out_anew(sound: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(sound / "msrvtt", root / "msrvtt", ignore=shutil.ignore_patterns("frames"))
    prepare(root)
    next((root / "msrvtt" / "frames").rglob("test.npy")).unlink()
    (problem,) = MSRVTT.verify(root, workers=0, **SMALL).problems
    assert "test: the frame cache has lost its frames" in problem and "prepare it again" in problem
    options = {**SMALL, "decode_every_epoch": False}
    with pytest.raises(FileNotFoundError, match=r"no frame cache holds 3 of 3 videos .* run python"):
        MSRVTT(root, "test", **options)
    prepare(root)
    np.testing.assert_array_equal(MSRVTT(root, "test", **options).visual(0), MSRVTT(sound, "test", **SMALL).visual(0))
    assert not MSRVTT.verify(root, workers=0, **SMALL).problems


def test_verify_says_whether_the_pretrained_weights_are_there(sound: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(sound / "msrvtt", root / "msrvtt", ignore=shutil.ignore_patterns("frames"))
    for there in (False, True):
        found = MSRVTT.verify(root, workers=0, **SMALL)
        assert not found.problems
        assert f" is {'there' if there else 'not there yet'}: {root / 'ViT-B-32.pt'}\n" in found.text()
        (root / "ViT-B-32.pt").touch()
    for model, weights in (("clip4clip_vit_b32", "ViT-B-32.pt"), ("vse_infty_base", "bert-base-uncased")):
        settings = compose("train_retrieval", [f"model={model}", f"root={root}"])["model"]
        assert str(root / weights) in (settings.get("weights"), settings.get("text"))

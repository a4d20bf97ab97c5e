from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from retrieval.data import SPLITS
from retrieval.data.motions import MOTIONS, animate, describe
from retrieval.data.openmoji_clips import LENGTH, OpenMojiClips, encode_h264, sample_clips
from retrieval.video import read_frames

TINY = (12, 4, 4)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    OpenMojiClips.prepare(root, root / "cache", clips=TINY)
    return root


@pytest.mark.parametrize(("split", "count"), list(zip(SPLITS, TINY, strict=True)))
def test_a_split(root: Path, split: str, count: int) -> None:
    data = OpenMojiClips(root, split, frames=4, size=56)
    assert (data.name, data.split, len(data), len(data.captions)) == ("openmoji_clips", split, count, 3 * count)
    np.testing.assert_array_equal(data.image_of_caption, np.repeat(np.arange(count), 3))
    assert data.image_of_caption.dtype == np.int64
    frames = data.visual(count - 1)
    assert frames.shape == (4, 56, 56, 3) and frames.dtype == np.uint8
    assert [picture.size for picture in data.thumbnails(0)] == [(112, 112)] * 4
    assert OpenMojiClips(root, split, frames=99).visual(0).shape == (LENGTH, 112, 112, 3)


def test_captions_say_what_the_clip_shows(root: Path) -> None:
    shown = pd.read_csv(root / "openmoji_clips" / "clips.csv").set_index("video_id")
    for split in SPLITS:
        data = OpenMojiClips(root, split)
        for caption, owner in zip(data.captions, data.image_of_caption, strict=True):
            clip = shown.loc[data.video_ids[owner]]
            assert clip["split"] == split
            assert clip["emoji"] in caption
            assert any(caption.endswith(phrase) for phrase in MOTIONS[clip["motion"]].phrases)


def test_pairs_of_the_full_set_are_unseen_and_their_parts_are_seen() -> None:
    table = sample_clips((1100, 200, 200), seed=0)
    assert table["split"].value_counts().to_dict() == {"train": 1100, "validation": 200, "test": 200}
    assert table["emoji"].nunique() == 150
    assert not table.duplicated(["emoji", "motion"]).any()  # so no pair is in two splits
    train = table[table["split"] == "train"]
    assert set(train["emoji"]) == set(table["emoji"])
    assert (train["motion"].value_counts() > 90).all() and set(train["motion"]) == set(MOTIONS)
    pd.testing.assert_frame_equal(table, sample_clips((1100, 200, 200), seed=0))
    assert not table.equals(sample_clips((1100, 200, 200), seed=1))


def test_the_same_seed_gives_the_same_files(root: Path, tmp_path: Path) -> None:
    OpenMojiClips.prepare(tmp_path, tmp_path / "cache", clips=TINY)
    fingerprints = [OpenMojiClips(root, split).fingerprint for split in SPLITS]
    assert fingerprints == [OpenMojiClips(tmp_path, split).fingerprint for split in SPLITS]
    assert len(set(fingerprints)) == 3


def test_preparing_again_does_nothing(root: Path) -> None:
    file = OpenMojiClips(root, "train").path(0)
    before = file.stat().st_mtime_ns
    OpenMojiClips.prepare(root, root / "cache", clips=TINY)
    assert file.stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="delete it or choose another root"):
        OpenMojiClips.prepare(root, root / "cache", clips=TINY, seed=1)


def test_a_killed_preparation_leaves_nothing_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("retrieval.data.openmoji_clips.encode_h264", killed)
    with pytest.raises(KeyboardInterrupt):
        OpenMojiClips.prepare(tmp_path, tmp_path, clips=(3, 1, 1))
    with pytest.raises(FileNotFoundError, match=r"prepare_data\.py data=openmoji_clips"):
        OpenMojiClips(tmp_path, "train")
    monkeypatch.undo()
    OpenMojiClips.prepare(tmp_path, tmp_path, clips=(3, 1, 1))
    assert len(OpenMojiClips(tmp_path, "train")) == 3


@pytest.mark.parametrize("options", [{"clips": (0, 1, 1)}, {"clips": (10_000, 1, 1)}, {"size": 111}, {"size": 0}])
def test_impossible_options(tmp_path: Path, options: dict) -> None:
    with pytest.raises(ValueError, match=r"clips=|size"):
        OpenMojiClips.prepare(tmp_path, tmp_path, **options)


def test_unknown_split(root: Path) -> None:
    with pytest.raises(ValueError, match="train, validation, test"):
        OpenMojiClips(root, "dev")


def test_describe() -> None:
    assert describe("an owl", "spin") == (
        "an owl spinning",
        "an owl rotating on the spot",
        "a clip of an owl turning round and round",
    )
    phrases = [phrase for motion in MOTIONS.values() for phrase in motion.phrases]
    assert len(set(phrases)) == 30


def filmed(motion: str, folder: Path) -> np.ndarray:
    """(16, 112, 112) float: how much a dark square is seen at each pixel, after encoding and decoding."""
    sprite = np.zeros((112, 112, 4), np.uint8)
    sprite[20:-20, 20:-20, 3] = 255
    path = folder / f"{motion}.mp4"
    encode_h264(path, animate(sprite, motion, (255, 255, 255), 112, LENGTH), 8)
    return 255.0 - read_frames(path, LENGTH).mean(axis=-1)


@pytest.mark.parametrize(("motion", "axis", "sign"), [("left", 1, -1), ("right", 1, 1), ("up", 0, -1), ("down", 0, 1)])
def test_directions(tmp_path: Path, motion: str, axis: int, sign: int) -> None:
    seen = filmed(motion, tmp_path)
    along = seen.sum(axis=2 - axis)  # (16, 112), per column for axis 1, per row for axis 0
    centre = (along * np.arange(112)).sum(axis=1) / along.sum(axis=1)
    assert (sign * np.diff(centre) > 1).all()
    assert sign * (centre[-1] - centre[0]) == pytest.approx(0.54 * 112, abs=2)
    across = seen.sum(axis=1 + axis)
    other = (across * np.arange(112)).sum(axis=1) / across.sum(axis=1)
    np.testing.assert_allclose(other, 55.5, atol=1)


def test_sizes_and_opacity(tmp_path: Path) -> None:
    amount = {motion: filmed(motion, tmp_path).sum(axis=(1, 2)) for motion in MOTIONS}
    assert (np.diff(amount["grow"]) > 0).all() and amount["grow"][-1] > 7 * amount["grow"][0]
    assert (np.diff(amount["shrink"]) < 0).all()
    assert (np.diff(amount["fade"]) < 0).all() and amount["fade"][-1] < 0.02 * amount["fade"][0]
    assert (amount["appear"][:8] < 0.02 * amount["appear"][-1]).all()
    assert amount["appear"][8] == pytest.approx(amount["appear"][-1], rel=0.05)
    for motion in ("left", "spin", "shake"):
        np.testing.assert_allclose(amount[motion], amount[motion].mean(), rtol=0.05)


def test_spin_and_shake_move_and_come_back(tmp_path: Path) -> None:
    for motion in ("spin", "shake"):
        seen = filmed(motion, tmp_path)
        change = np.abs(seen - seen[0]).mean(axis=(1, 2))
        assert change[-1] < 0.3 * change.max()

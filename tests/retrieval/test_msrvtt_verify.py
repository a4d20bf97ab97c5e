"""What `verify` says of MSR-VTT's files, of the frame cache and of the pretrained weights."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from msrvtt_folder import SMALL, TEST, TRAIN, prepare

from retrieval.data import MSRVTT

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from command_line import compose


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

"""The words of `prepare_data.py`: what they print and how they exit."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))  # as for `python scripts/prepare_data.py`

import prepare_data
from command_line import compose, launch

from retrieval.data import DATASETS, OpenMojiClips, OpenMojiScenes
from retrieval.regions.verify import SAMPLES

ROOT = Path(__file__).parents[2]


def test_verify_as_a_command(scenes: Path) -> None:
    command = [sys.executable, "scripts/prepare_data.py", "verify", "data=openmoji", f"root={scenes}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "nothing is wrong" in done.stdout and "train" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "hint"),
    [
        (("verfy", "data=openmoji"), 2, "unknown word 'verfy'; did you mean verify?"),
        (("verify", "data=msrvtt"), 2, "MSRVTT_JSFUSION_test.csv"),
    ],
)
def test_a_mistake_is_told(
    arguments: tuple[str, ...],
    code: int,
    hint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", *arguments, f"root={tmp_path}"])
    with pytest.raises(SystemExit) as stop:
        launch(prepare_data.main, "prepare_data", "", words={"verify": prepare_data.verify})
    assert hint in capsys.readouterr().err and stop.value.code == code


def test_what_is_wrong_is_named(scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    shutil.copytree(scenes / "openmoji", tmp_path / "openmoji")
    folder = tmp_path / "openmoji"
    (folder / "pictures" / "test" / "00003.png").write_bytes(b"no picture")
    features = np.load(folder / "validation_ims.npy")
    features[5, 0, 0] = np.nan
    np.save(folder / "validation_ims.npy", features)
    (folder / "train_caps.txt").unlink()
    with pytest.raises(SystemExit) as stop:
        prepare_data.verify(compose("prepare_data", ["data=openmoji", f"root={tmp_path}"]))
    assert stop.value.code == 1
    printed = capsys.readouterr().out
    for part in ("train_caps.txt", "validation: scene 5: its region features are not finite", "test: scene 3: "):
        assert part in printed
    assert "3 problems" in printed


def test_clips_are_checked_and_cached(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    OpenMojiClips.prepare(tmp_path, tmp_path, clips=(3, 1, 1), size=32)
    for decode in ("false", "true"):
        prepare_data.verify(compose("prepare_data", ["data=openmoji_clips", f"root={tmp_path}", f"decode={decode}"]))
    assert capsys.readouterr().out.count("nothing is wrong") == 2
    plain, cached = (OpenMojiClips(tmp_path, "train", frames=4, size=28, cache=cache) for cache in (False, True))
    assert cached.fingerprint == plain.fingerprint
    for index in range(3):
        np.testing.assert_array_equal(cached.visual(index), plain.visual(index))
    plain.path(1).write_bytes(b"")
    assert len(cached.visual(1)) == 4
    with pytest.raises(SystemExit):
        prepare_data.verify(compose("prepare_data", ["data=openmoji_clips", f"root={tmp_path}"]))
    assert "the file is empty" in capsys.readouterr().out
    with pytest.raises(ValueError, match="the file is empty"):
        OpenMojiClips(tmp_path, "train", frames=3, size=28, cache=True)


@pytest.mark.parametrize("name", DATASETS)
def test_every_data_set_can_be_verified(name: str) -> None:
    config = compose("prepare_data", [f"data={name}"])
    assert config["data"]["name"] == name and callable(DATASETS[name].verify)


def test_scenes_have_no_options(scenes: Path) -> None:
    assert not OpenMojiScenes.verify(scenes).problems


def test_prepare_of_msrvtt_reads_the_settings_of_the_data() -> None:
    settings = compose("prepare_data", ["data=msrvtt", "data.frames=8", "data.size=56", "data.train=7k"])["data"]
    shared = ("train", "frames", "frames_per_second", "slicing", "size", "max_unreadable", "check_counts")
    assert {key: settings["prepare"][key] for key in shared} == {key: settings[key] for key in shared}
    assert settings["prepare"]["frames"] == 8


def test_the_command_says_what_it_looks_at() -> None:
    settings = (ROOT / "scripts" / "conf" / "prepare_data.yaml").read_text(encoding="utf-8")
    assert f"the region features of {SAMPLES} images a split" in " ".join((prepare_data.__doc__ or "").split())
    assert f"{SAMPLES} a split" in settings and "opens every item" not in (prepare_data.__doc__ or "")

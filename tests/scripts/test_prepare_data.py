"""The words of `prepare_data.py`: what they print and how they exit."""

from __future__ import annotations

import inspect
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))  # as for `python scripts/prepare_data.py`
sys.path.insert(0, str(Path(__file__).parents[1] / "classification"))

import prepare_data
from command_line import compose, launch
from vtab_folder import write_few_shot, write_vtab

from classification.data import DATASETS as CLASSIFICATION
from classification.data.verification import LOOKED_AT
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
        (("data=vtab",), 2, "run data/vtab-source/get_vtab1k.py of github.com/ZhangYuanhan-AI/NOAH"),
        (("verify", "data=vtab"), 2, "none of cifar, caltech101, dtd"),
        (("data=few_shot",), 2, "copy data/few-shot of github.com/ZhangYuanhan-AI/NOAH"),
        (("verify", "data=vtab", "data.prepare.datasets=[kiti]"), 2, "did you mean 'kitti'?"),
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


@pytest.mark.parametrize("name", [*DATASETS, "vtab", "few_shot"])
def test_every_data_set_can_be_verified(name: str) -> None:
    config = compose("prepare_data", [f"data={name}"])
    assert config["data"]["name"] == name and callable(prepare_data.datasets()[name].verify)


def test_vtab_is_counted_beside_the_published_numbers(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    sizes = {"train800": 800, "val200": 200, "train800val200": 1000, "test": 711}
    folder = write_vtab(tmp_path, "kitti", lines=sizes, side=8, kinds=2)
    overrides = ["data=vtab", f"root={tmp_path}", "data.prepare.datasets=[kitti]"]
    prepare_data.main(compose("prepare_data", overrides))
    prepare_data.verify(compose("prepare_data", [*overrides, "decode=true"]))
    printed = capsys.readouterr().out
    assert f"data ready in {tmp_path / 'vtab-1k'}" in printed and "nothing is wrong" in printed
    assert printed.count("711 / 711") == printed.count("1000 / 1000") == printed.count("4 / 4") == 1

    (folder / "images" / "test" / "000000.jpg").unlink()
    (folder / "images" / "test" / "000001.jpg").write_bytes(b"no picture")  # a link: others are damaged with it
    (folder / "val200.txt").write_text("images/val200/000000.jpg 0\n")
    (folder / "train800.txt").unlink()
    with pytest.raises(SystemExit) as stop:
        prepare_data.verify(compose("prepare_data", ["data=vtab", f"root={tmp_path}"]))
    assert stop.value.code == 1
    printed = capsys.readouterr().out
    for part in (
        "18 data sets are not there: cifar, caltech101",
        "there is no " + str(folder / "train800.txt"),
        "val200.txt has 1 lines, published are 200",
        "1 images are not in " + str(folder),
        " images looked at: " + str(folder / "images" / "test"),
        ".jpg cannot be read as an image",
        "1 / 200",
        "5 problems",
    ):
        assert part in printed, printed
    for chosen, message in (
        ("kitti", r"there is no .*train800\.txt"),
        ("[kitti,dtd]", r"not there: dtd\.\nExpected in"),
    ):
        settings = compose("prepare_data", ["data=vtab", f"root={tmp_path}", f"data.prepare.datasets={chosen}"])
        with pytest.raises(FileNotFoundError, match=message):
            prepare_data.main(settings)


def test_few_shot_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_few_shot(tmp_path, "food101", side=8)
    overrides = ["data=few_shot", f"root={tmp_path}", "data.prepare.datasets=[food101]"]
    prepare_data.verify(compose("prepare_data", [*overrides, "data.check_counts=false"]))
    printed = capsys.readouterr().out
    for part in ("3 / 101", "9 / 303", "144 / 4848", "6 / 20200", "6 / 30300", "nothing is wrong"):
        assert part in printed, printed


@pytest.mark.parametrize("name", ["vtab", "few_shot"])
def test_the_configuration_is_what_the_data_set_takes(name: str) -> None:
    for command, more, subset in (("prepare_data", [], 0), ("train_classification", ["seed=2", "model=vit_b16"], 2)):
        settings = compose(command, [f"data={name}", "root=/somewhere", *more])["data"]
        assert settings["root"] == "/somewhere" and settings.get("subset_seed", subset) == subset
        settings = {key: value for key, value in settings.items() if key not in ("name", "prepare")}
        parameters = inspect.signature(CLASSIFICATION[name]).parameters
        assert set(settings) == set(parameters), "every setting can be found in the file"
        for key, parameter in parameters.items():
            if key not in ("root", "dataset", "subset_seed"):
                assert settings[key] == parameter.default


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
    assert f"{LOOKED_AT} images of every list of vtab" in " ".join((prepare_data.__doc__ or "").split())
    assert f"{SAMPLES} a split" in settings and "opens every item" not in (prepare_data.__doc__ or "")

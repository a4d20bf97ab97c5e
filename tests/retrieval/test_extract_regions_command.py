"""The command that extracts region features: its options, what it says, and whose folder it writes into."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import Killed, killed_while_writing, write_pictures
from region_folders import write_folder
from torch import nn

from retrieval.data import Flickr30K
from retrieval.regions.precomputed import read_precomputed

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import extract_regions

SIZE = 64  # pixels; the published detectors take 800


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return write_pictures(tmp_path)


def write_split_file(path: Path, captions: int = 5) -> Path:
    splits = ["train", "train", "val", "test"]
    images = [
        {
            "imgid": n,
            "filename": f"{n}.png",
            "split": split,
            "sentences": [{"raw": f"{n} {m}"} for m in range(captions)],
        }
        for n, split in enumerate(splits)
    ]
    path.write_text(json.dumps({"dataset": "flickr30k", "images": images}))
    return path


@pytest.mark.parametrize("given", [None, "cpu"])
def test_the_device(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str | None) -> None:
    moved: list[torch.device] = []

    class Model(nn.Module):
        def to(self, device: torch.device) -> Model:
            moved.append(device)
            return self

    monkeypatch.setattr(extract_regions, "faster_rcnn", lambda weights, size: Model())
    monkeypatch.setattr(extract_regions, "region_features", lambda *_: np.ones((36, 1024), np.float32))
    files = {"images": pictures, "karpathy": write_split_file(tmp_path / "split.json"), "output": tmp_path / "out"}
    arguments = ["--random-weights", *(part for name, path in files.items() for part in (f"--{name}", str(path)))]
    extract_regions.main([*arguments, *([] if given is None else ["--device", given])])
    assert moved == [torch.device(given or ("cuda" if torch.cuda.is_available() else "cpu"))]


def test_devices_that_are_not_there(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    common = ["--images", "a", "--karpathy", "b", "--output", "c", "--random-weights"]
    for name, message in (("gpu", "'gpu' is no device of torch"), ("cuda", "torch sees no CUDA device")):
        with pytest.raises(SystemExit, match="2"):
            extract_regions.main([*common, "--device", name])
        assert message in capsys.readouterr().err


def test_the_command(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    split_file = write_split_file(tmp_path / "split.json")
    output = tmp_path / "out"

    def run(*arguments: object, images: Path = pictures, size: int = SIZE) -> None:
        common = ("--images", images, "--karpathy", split_file, "--output", output, "--size", size, "--boxes", 4)
        extract_regions.main([*map(str, common), *map(str, arguments)])

    run("--random-weights")
    assert read_precomputed(output, "train").features.shape == (2, 4, 1024)
    assert "train: 2 images, 0 unreadable" in capsys.readouterr().out
    assert "fc7 of the 4 best boxes, 64 px, random weights" in (output / "source.txt").read_text()
    for arguments, changed, message in (
        ((), {}, "give the detector's --weights FILE, or --random-weights"),
        (("--random-weights",), {"images": output}, "none of 4 pictures is in --images"),
        (("--random-weights",), {"size": 2 * SIZE}, "holds features from torchvision Faster R-CNN"),
    ):
        with pytest.raises(SystemExit, match="2"):
            run(*arguments, **changed)
        printed = capsys.readouterr().err
        assert message in printed and len(printed.strip().splitlines()) == 1
    assert extract_regions.parser().format_help().count("python scripts/extract_regions.py ") >= 2


def test_what_is_left_out_is_said(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    said_at_the_start: list[str] = []

    def features(*_: object) -> np.ndarray:
        said_at_the_start.append(capsys.readouterr().out)
        return np.ones((36, 1024), np.float32)

    monkeypatch.setattr(extract_regions, "faster_rcnn", lambda weights, size: nn.Identity())
    monkeypatch.setattr(extract_regions, "region_features", features)
    (pictures / "1.png").unlink()
    split_file = write_split_file(tmp_path / "split.json", captions=6)
    files = ["--images", str(pictures), "--karpathy", str(split_file), "--output", str(tmp_path / "out")]
    extract_regions.main(["--random-weights", *files])
    assert f"1 of 4 pictures are not in {pictures}, 1.png for one" in said_at_the_start[0]
    assert "4 captions beyond the fifth of an image were left out" in capsys.readouterr().out
    (tmp_path / "out" / "train_ims.npy").rename(tmp_path / "out" / "train_ims.npy.journal")
    for split in ("dev", "test"):
        (tmp_path / "out" / f"{split}_ims.npy").unlink()
    with pytest.raises(SystemExit, match="2"):
        extract_regions.main(["--random-weights", "--size", "90", *files])
    assert "holds features from" in capsys.readouterr().err, "one that is begun is not given another source"


# ---- source.txt


def test_a_launch_that_is_killed_does_not_lose_whose_features_these_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = tmp_path / "dev_ims.npy.journal"
    extract_regions.claim(tmp_path, "a detector", [begun])
    begun.touch()
    monkeypatch.setattr(Path, "write_text", killed_while_writing)
    extract_regions.claim(tmp_path, "a detector", [begun])  # nothing to write
    begun.unlink()
    with pytest.raises(Killed):
        extract_regions.claim(tmp_path, "another", [begun])
    assert (tmp_path / "source.txt").read_text() == "a detector\n"


def test_an_empty_source_is_none(tmp_path: Path) -> None:
    """As a kill of an earlier version left it."""
    folder, begun = tmp_path / "flickr30k", tmp_path / "flickr30k" / "dev_ims.npy.journal"
    write_folder(folder)
    (folder / "source.txt").touch()
    assert Flickr30K(tmp_path, "test", counts="any").preprocessing.endswith("12 numbers, float32")
    begun.touch()
    with pytest.raises(ValueError, match="holds features from a source that it does not name, not from a detector"):
        extract_regions.claim(folder, "a detector", [begun])
    begun.unlink()
    extract_regions.claim(folder, "a detector", [begun])
    assert Flickr30K(tmp_path, "test", counts="any").preprocessing.endswith("12 numbers, float32; a detector")

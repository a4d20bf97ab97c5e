"""A tiny video benchmark from options to page, and that all ways read the same frames. No time is tested."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))  # as for `python scripts/benchmark.py`

import benchmark
from benchmarks import prior_video, video

TINY = {"clips": 2, "seconds": 3, "width": 64, "height": 48, "rate": 8, "frames": 2, "size": 32, "pairs": 2}


@pytest.fixture(autouse=True)
def same_threads() -> object:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_all_ways_read_the_same_frames(tmp_path: Path) -> None:
    settings = video.Settings(output=tmp_path, **{**TINY, "seconds": 6})
    path = tmp_path / "clip.mp4"
    video.encode(path, 0, settings)
    frames = {backend: video.reading(settings, backend).of(path) for backend in ("decord", "pyav")}
    ours = video.normalise_frames(torch.from_numpy(frames["decord"])[None], prior_video.MEAN, prior_video.STD)[0]
    np.testing.assert_array_equal(frames["decord"], frames["pyav"])
    prior = prior_video.prior_clip(path, settings.frames, settings.size)
    torch.testing.assert_close(prior, ours, rtol=0, atol=1e-5)
    assert (np.diff(frames["pyav"].astype(float), axis=0) != 0).mean() > 0.5  # the picture moves


def test_a_tiny_benchmark_writes_its_page(tmp_path: Path) -> None:
    options = [text for name, value in TINY.items() for text in (f"--{name}", str(value))]
    benchmark.main(["video", *options, "--output", str(tmp_path / "made")])
    page = (tmp_path / "made" / "video.md").read_text()
    for line in ("| from the file, decord |", "| from the frame cache |", "Clips a second"):
        assert line in page
    results = json.loads((tmp_path / "made" / "video.json").read_text())
    assert [row["name"] for row in results["rows"]] == ["decord", "PyAV", "frame cache"]
    for row in results["rows"]:
        assert len(row["time_ratios"]) == len(row["seconds"]) == len(row["prior_seconds"]) == 2


@pytest.mark.parametrize(("arguments", "hint"), [(["--clips", "0"], "clips is 0"), (["--width", "33"], "33 x 240")])
def test_a_mistake_says_what_is_expected(
    arguments: list[str], hint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        benchmark.main(["video", *arguments, "--output", str(tmp_path)])
    assert hint in capsys.readouterr().err
    assert not list(tmp_path.iterdir())

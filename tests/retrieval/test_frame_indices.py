"""Which frames of a video are kept: by count, by time and by slicing."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from video_files import encode

from retrieval.video import frame_indices
from retrieval.video.timeline import timeline


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.avi"])  # the second rounds times to milliseconds
@pytest.mark.parametrize("rate", [Fraction(30_000, 1001), 24, 30])
def test_rounded_times_are_a_constant_rate(tmp_path: Path, name: str, rate: Fraction | int) -> None:
    path = encode(tmp_path / name, 130, "mpeg4", rate=rate, options={"b": "2000000"})
    line = timeline(path)
    assert line.fps == pytest.approx(float(rate), rel=1e-6)
    for a_second in (1.0, 1.5, 3.0, 7.0, 100.0):
        expected = sorted({int(k * rate / Fraction(a_second)) for k in range(1000)})
        expected = [index for index in expected if index < 130]
        assert frame_indices(130, line.fps, 130, "head", a_second, seconds=line.seconds).tolist() == expected


def test_frame_indices_of_13_seconds() -> None:
    assert frame_indices(13 * 30, 30, 12, "uniform", 1).tolist() == [30 * second for second in (*range(11), 12)]


def test_frame_indices_at_29_97() -> None:
    assert frame_indices(899, 30000 / 1001, 100, "head", 1).tolist() == [int(k * 30000 / 1001) for k in range(30)]


@given(
    total=st.integers(1, 400),
    fps=st.integers(1, 60),
    count=st.integers(1, 20),
    slicing=st.sampled_from(["head", "tail", "uniform"]),
    rate=st.sampled_from([None, 1]),
)
def test_frame_indices_by_the_rule(total: int, fps: int, count: int, slicing: str, rate: int | None) -> None:
    candidates = [index for index in range(total) if rate is None or index % fps == 0]
    if len(candidates) > count:
        last = len(candidates) - 1
        spaced = [int(position) for position in np.linspace(0, last, count)]
        picked = {"head": range(count), "tail": range(last + 1 - count, last + 1), "uniform": spaced}[slicing]
        candidates = [candidates[position] for position in picked]
    indices = frame_indices(total, fps, count, slicing, rate)
    assert indices.tolist() == candidates
    assert indices.dtype == np.int64


@given(total=st.integers(1, 400), fps=st.floats(0.5, 240), rate=st.floats(0.1, 100), count=st.integers(1, 500))
def test_frame_indices_are_distinct_and_in_range(total: int, fps: float, rate: float, count: int) -> None:
    indices = frame_indices(total, fps, count, "uniform", rate)
    assert 1 <= len(indices) <= count and indices[0] == 0 and indices[-1] < total
    assert (np.diff(indices) > 0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 25.0, 4), "at least 1"),
        ((10, 25.0, 0), "at least 1"),
        ((10, 25.0, 4, "middle"), "head, tail, uniform"),
        ((10, 25.0, 4, "head", -1.0), "positive"),
    ],
)
def test_frame_indices_refuses(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        frame_indices(*arguments)

"""A frame cache against `read_frames` on the same files, with kills, damage and other options on the way."""

from __future__ import annotations

import json
import pickle
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from filelock import FileLock
from video_files import BAD_FILES, CLOSED, encode, numbers

import retrieval.video.cache_writer as writer
from retrieval.video import read_frames
from retrieval.video.cache import CacheFiles, FrameCache, read_journal
from retrieval.video.cache_writer import write_cache
from retrieval.video.reading import Reading

READING = Reading(frames=4, frames_per_second=1.0, size=32)


class Sleeper(Reading):
    """A reader that hangs on some files, as decoders do."""

    def of(self, path) -> np.ndarray:
        if "slow" in Path(path).name:
            time.sleep(600)
        return super().of(path)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Sound videos of several lengths and codecs."""
    folder = tmp_path_factory.mktemp("videos")
    return {
        "long": encode(folder / "long.mp4", 144, options=CLOSED),  # 6 s: 6 candidates, 4 are kept
        "short": encode(folder / "short.mp4", 40),  # 2 candidates
        "single": encode(folder / "single.mp4", 1),
        "mpeg4": encode(folder / "mpeg4.mp4", 60, codec="mpeg4", rate=12),
        "webm": encode(folder / "webm.webm", 40, codec="libvpx-vp9", rate=8, options={"deadline": "realtime"}),
    }


def files(folder: Path, reading: Reading = READING) -> CacheFiles:
    return CacheFiles(folder / "frames", "list", reading)


def counting(monkeypatch: pytest.MonkeyPatch, stop_after: int | None = None) -> list[str]:
    """The names of the files that are read from now on; as if killed after some."""
    calls: list[str] = []
    read_clip = writer.read_clip

    def counted(path: Path, reading: Reading) -> writer.Clip:
        if len(calls) == stop_after:
            raise KeyboardInterrupt
        calls.append(path.name)
        return read_clip(path, reading)

    monkeypatch.setattr(writer, "read_clip", counted)
    return calls


def test_frames_are_those_of_read_frames(tmp_path: Path, videos: dict[str, Path]) -> None:
    write_cache(files(tmp_path), videos, workers=0)
    cache = FrameCache(files(tmp_path))
    for clip, path in videos.items():
        frames = cache.frames(clip)
        np.testing.assert_array_equal(frames, read_frames(path, 4, frames_per_second=1.0, size=32))
        assert frames.dtype == np.uint8 and len(frames) == cache.items[clip].frames
    assert [cache.items[clip].frames for clip in videos] == [4, 2, 1, 4, 4]
    stored = np.load(files(tmp_path).pixels)
    assert stored.shape == (5, 4, 32, 32, 3) and not stored[1, 2:].any() and not stored[2, 1:].any()
    assert cache.summary() == "list: 5 of 5 videos have frames"
    assert list(pd.read_csv(files(tmp_path).report).columns) == ["clip", "video", "reason"]


def test_what_cannot_be_read_is_counted_and_named(tmp_path: Path, videos: dict[str, Path]) -> None:
    bad = {f"bad{number}": tmp_path / f"bad{number}.mp4" for number in range(len(BAD_FILES))}
    for path, (make, _) in zip(bad.values(), BAD_FILES.values(), strict=True):
        make(path)
    cache = write_cache(files(tmp_path), {**bad, "long": videos["long"]}, workers=0)
    assert list(cache.unreadable) == list(bad)
    for clip in bad:
        assert cache.frames(clip).shape == (0, 32, 32, 3) and cache.frames(clip).dtype == np.uint8
    np.testing.assert_array_equal(cache.frames("long"), READING.of(videos["long"]))
    report = pd.read_csv(files(tmp_path).report)
    assert report["clip"].tolist() == list(bad)
    for reason, (_, expected) in zip(report["reason"], BAD_FILES.values(), strict=True):
        assert any(part in reason for part in expected.split("|"))
    count = len(bad)
    assert (
        cache.summary()
        == f"list: 1 of {count + 1} videos have frames, {count} cannot be read: see {cache.files.report}"
    )


def test_a_killed_call_is_resumed(tmp_path: Path, videos: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        first = counting(patch, stop_after=3)
        with pytest.raises(KeyboardInterrupt):
            write_cache(files(tmp_path), videos, workers=0)
    names = [path.name for path in videos.values()]
    partial = FrameCache(files(tmp_path))
    assert first == names[:3] and list(partial.items) == list(videos)[:3]
    assert "2 are not done yet" in partial.summary() and "webm" not in partial
    np.testing.assert_array_equal(partial.frames("long"), READING.of(videos["long"]))

    with files(tmp_path).journal.open("ab") as journal:
        journal.write(b'{"clip": "mpeg4", "frames": 4, "rea')  # a kill in the middle of a line
    assert list(FrameCache(files(tmp_path)).items) == list(videos)[:3]
    with monkeypatch.context() as patch:
        second = counting(patch)
        cache = write_cache(files(tmp_path), videos, workers=0)
    assert second == names[3:]
    for clip, path in videos.items():
        np.testing.assert_array_equal(cache.frames(clip), READING.of(path))
    with monkeypatch.context() as patch:
        third = counting(patch)
        write_cache(files(tmp_path), videos, workers=0)
    assert third == []


def test_frames_are_on_the_disk_before_they_are_promised(
    tmp_path: Path, videos: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every commit, whatever the journal names is in the file already."""
    monkeypatch.setattr(writer, "BATCH", 2)
    commit = writer._Writer.commit

    def checked(self: writer._Writer) -> None:
        commit(self)
        stored = np.load(files(tmp_path).pixels)
        for clip, item in read_journal(files(tmp_path).journal).items():
            np.testing.assert_array_equal(stored[self.rows[clip], : item.frames], READING.of(videos[clip]))

    monkeypatch.setattr(writer._Writer, "commit", checked)
    write_cache(files(tmp_path), videos, workers=0)


def test_repaired_and_changed_videos_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clips = {name: tmp_path / f"{name}.mp4" for name in ("same", "changed", "came", "removed")}
    for name in ("same", "changed", "removed"):
        encode(clips[name], 30)
    write_cache(files(tmp_path), clips, workers=0)
    clips["removed"].unlink()
    encode(clips["changed"], 60)
    encode(clips["came"], 30)
    calls = counting(monkeypatch)
    cache = write_cache(files(tmp_path), clips, workers=0)
    assert calls == ["changed.mp4", "came.mp4"]
    assert [cache.items[name].frames for name in clips] == [2, 3, 2, 2] and not cache.unreadable
    assert numbers(Reading(frames=1, size=64).of(clips["same"])) == [0]


def test_other_options_get_another_cache(tmp_path: Path, videos: dict[str, Path]) -> None:
    write_cache(files(tmp_path), videos, workers=0)
    others = [Reading(frames=4, frames_per_second=rate, slicing=slicing, size=size) for rate, slicing, size in
              ((2.0, "uniform", 32), (1.0, "head", 32), (1.0, "uniform", 48), (None, "uniform", 32))]  # fmt: skip
    for other in others:
        assert FrameCache.find(files(tmp_path, other)) is None
        with pytest.raises(FileNotFoundError, match="no frame cache"):
            FrameCache(files(tmp_path, other))
    assert len({reading.key for reading in (READING, *others)}) == 5
    assert FrameCache.find(files(tmp_path, Reading(frames=4, frames_per_second=1.0, size=32, backend="pyav")))
    (tmp_path / "frames" / READING.key).rename(tmp_path / "frames" / others[1].key)
    with pytest.raises(ValueError, match=r"'slicing': 'uniform'.*expected.*'slicing': 'head'.*delete"):
        FrameCache(files(tmp_path, others[1]))


def test_other_clips_are_refused(tmp_path: Path, videos: dict[str, Path]) -> None:
    write_cache(files(tmp_path), videos, workers=0)
    with pytest.raises(ValueError, match=r"written for other clips.*delete"):
        write_cache(files(tmp_path), {"single": videos["single"]}, workers=0)


def test_damaged_pixels_are_refused(tmp_path: Path, videos: dict[str, Path]) -> None:
    cache = write_cache(files(tmp_path), videos, workers=0)
    np.save(cache.files.pixels, np.zeros((2, 2), np.uint8))
    with pytest.raises(ValueError, match=r"expected uint8 \(5, 4, 32, 32, 3\)"):
        FrameCache(files(tmp_path)).frames("long")


def test_a_reader_that_hangs_is_given_up(
    tmp_path: Path, videos: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is not touched again in this process, where it would have no time limit."""
    hashed: list[Path] = []
    monkeypatch.setattr(writer, "size_and_digest", lambda path: hashed.append(path) or (0, ""))
    slow = tmp_path / "slow.mp4"
    slow.write_bytes(videos["short"].read_bytes())
    reading = Sleeper(frames=4, frames_per_second=1.0, size=32)
    clips = {"slow": slow, "short": videos["short"]}
    cache = write_cache(files(tmp_path, reading), clips, workers=1, time_limit=2)
    assert cache.unreadable == {"slow": "it took more than 2 s"}
    assert not hashed and cache.items["slow"].sha256 == "" != cache.items["short"].sha256
    assert cache.items["slow"].bytes == cache.items["short"].bytes == slow.stat().st_size
    np.testing.assert_array_equal(cache.frames("short"), READING.of(videos["short"]))


def test_one_process_writes_at_a_time(tmp_path: Path, videos: dict[str, Path]) -> None:
    where = files(tmp_path)
    where.pixels.parent.mkdir(parents=True)
    held = threading.Event()

    def other() -> None:
        with FileLock(where.path(".lock")):
            held.set()
            time.sleep(1.5)
            assert not where.pixels.exists()

    thread = threading.Thread(target=other)
    thread.start()
    held.wait()
    with pytest.warns(UserWarning, match="another process holds"):
        write_cache(where, {"single": videos["single"]}, workers=0)
    thread.join()
    assert where.pixels.exists()


def test_pickled_without_its_pixels(tmp_path: Path, videos: dict[str, Path]) -> None:
    cache = write_cache(files(tmp_path), videos, workers=0)
    expected = cache.frames("long")
    content = pickle.dumps(cache)
    assert len(content) < 5000
    np.testing.assert_array_equal(pickle.loads(content).frames("long"), expected)


def test_a_full_disk_is_told_before_any_work(
    tmp_path: Path, videos: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    calls = counting(monkeypatch)
    with pytest.raises(ValueError, match=r"needs up to .* GB"):
        write_cache(files(tmp_path), videos, workers=0)
    assert not calls and not files(tmp_path).pixels.exists()


def test_a_journal_takes_back(tmp_path: Path) -> None:
    lines = [{"clip": "a", "frames": 3}, {"clip": "b", "frames": 0, "reason": "empty"}, {"clip": "a"}]
    path = tmp_path / "journal"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert list(read_journal(path)) == ["b"] and read_journal(path)["b"].reason == "empty"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frames": 0}, "frames is 0"),
        ({"frames": 4, "size": 0}, "size is 0"),
        ({"frames": 4, "slicing": "middle"}, "uniform"),
        ({"frames": 4, "resizing": "opencv"}, "pillow, decoder"),
        ({"frames": 4, "frames_per_second": 0.0}, "positive"),
        ({"frames": 4, "backend": "opencv"}, "decord, pyav"),
    ],
)
def test_a_reading_is_checked_at_once(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Reading(**options)


def test_a_cache_needs_one_size(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs frames of one size"):
        files(tmp_path, Reading(frames=4))

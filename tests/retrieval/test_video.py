from __future__ import annotations

import pickle
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from video_files import BAD_FILES, CLOSED, SIDE, encode, numbered, numbers, shown_as

from retrieval.video import BACKENDS, VideoError, frame_indices, read_frames, resize_and_crop
from retrieval.video.timeline import timeline

OPEN = {"x264-params": "keyint=24:min-keyint=24:scenecut=0:bframes=3:b-adapt=0:open-gop=1"}
ALL_KEYS = {"x264-params": "keyint=1"}
HEVC = {"x265-params": "keyint=24:open-gop=0:bframes=4:log-level=none"}
VP9 = {"b": "1000000", "deadline": "realtime", "cpu-used": "8"}


def decoded(path: Path) -> np.ndarray:
    """Every frame, by PyAV alone."""
    with av.open(str(path)) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


FILES = {
    "h264": ("clip.mp4", {"options": CLOSED}),
    "h264 at 8 fps": ("clip.mp4", {"options": CLOSED, "rate": 8}),
    "h264 at 29.97 fps": ("clip.mp4", {"options": CLOSED, "rate": Fraction(30_000, 1001)}),
    "h264, 10 bits": ("clip.mp4", {"options": CLOSED, "pixels": "yuv420p10le"}),
    "h264, no B frames": ("clip.mp4", {"options": {"x264-params": "keyint=24:bframes=0"}}),
    "h264, x264's own settings": ("clip.mp4", {}),
    "h264, open groups": ("clip.mp4", {"options": OPEN}),
    "h264, open groups, matroska": ("clip.mkv", {"options": OPEN}),
    "h264, key frames only": ("clip.mp4", {"options": ALL_KEYS}),
    "h264, fragmented": ("clip.mp4", {"options": CLOSED, "movflags": "frag_keyframe+empty_moov"}),
    "h264, avi": ("clip.avi", {"options": CLOSED}),
    "mpeg4": ("clip.mp4", {"codec": "mpeg4", "options": {"b": "2000000"}}),
    "mpeg4 at 8 fps": ("clip.mp4", {"codec": "mpeg4", "rate": 8, "options": {"b": "2000000"}}),
    "hevc": ("clip.mp4", {"codec": "libx265", "options": HEVC}),
    "vp9": ("clip.mp4", {"codec": "libvpx-vp9", "options": VP9}),
    "vp9, webm": ("clip.webm", {"codec": "libvpx-vp9", "options": VP9}),
    "mpeg2, program stream": ("clip.mpg", {"codec": "mpeg2video", "options": {"b": "2000000"}}),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("file", FILES)
def test_frames_are_the_ones_asked_for(tmp_path: Path, file: str, backend: str) -> None:
    name, how = FILES[file]
    path = encode(tmp_path / name, total=130, **how)
    every = decoded(path)
    assert numbers(every) == list(range(130))
    for count, slicing in ((12, "uniform"), (5, "uniform"), (3, "tail"), (200, "head")):
        wanted = frame_indices(130, 24, count, slicing)
        frames = read_frames(path, count, slicing=slicing, backend=backend)
        np.testing.assert_array_equal(frames, every[wanted])


def test_decord_never_returns_a_wrong_frame(tmp_path: Path) -> None:
    """What decord is trusted with it reads exactly; seeks into open groups, where it does not, are refused."""
    trusted = []
    for name, options in (("closed", CLOSED), ("open", OPEN), ("keys", ALL_KEYS)):
        path = encode(tmp_path / f"{name}.mp4", total=100, options=options)
        line, every = timeline(path), decoded(path)
        trusted.append(line.seekable)
        for indices in (np.array([23, 24, 25, 72, 99]), np.array([48]), np.array([96])):
            if line.seekable:
                np.testing.assert_array_equal(BACKENDS["decord"](path, indices, line), every[indices])
            else:
                with pytest.raises(VideoError, match="wrong frames"):
                    BACKENDS["decord"](path, indices, line)
            np.testing.assert_array_equal(BACKENDS["pyav"](path, indices, line), every[indices])
    assert trusted == [True, False, True]


TURNS = {  # display matrix -> what a player shows
    "turned right": ((0, 1, -1, 0), lambda frames: np.rot90(frames, -1, axes=(1, 2))),
    "turned left": ((0, -1, 1, 0), lambda frames: np.rot90(frames, 1, axes=(1, 2))),
    "upside down": ((-1, 0, 0, -1), lambda frames: np.rot90(frames, 2, axes=(1, 2))),
    "mirrored": ((-1, 0, 0, 1), lambda frames: frames[:, :, ::-1]),
    "transposed": ((0, 1, 1, 0), lambda frames: frames.swapaxes(1, 2)),
}


@pytest.mark.parametrize("turn", TURNS)
def test_frames_are_turned_as_players_show_them(tmp_path: Path, turn: str) -> None:
    matrix, shown = TURNS[turn]
    stored, path, (width, height) = tmp_path / "stored.mp4", tmp_path / "turned.mp4", (96, 64)
    with av.open(str(stored), "w") as container:
        stream = container.add_stream("libx264", rate=5)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(10):
            picture = np.zeros((height, width, 3), np.uint8)
            picture[: height // 2, : width // 4] = 100 + 10 * number  # no symmetry
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    path.write_bytes(shown_as(stored.read_bytes(), matrix))
    for options in ({}, {"size": 32}, {"size": 32, "resizing": "decoder"}):
        read = [read_frames(path, 4, backend=backend, **options) for backend in BACKENDS]
        np.testing.assert_array_equal(*read)
        expected = shown(read_frames(stored, 4, backend="pyav", **options))
        assert read[0].shape == expected.shape
        # after the turn, a bicubic filter rounds otherwise
        np.testing.assert_allclose(read[0].astype(int), expected, atol=2 if options else 0)
    with pytest.raises(VideoError, match="turned or mirrored"):
        BACKENDS["decord"](path, np.array([0]), timeline(path))
    turned = BACKENDS["pyav"](path, np.array([0]), timeline(path), 32)
    assert turned.shape == shown(np.zeros((1, 32, 48, 3))).shape


def test_a_cut_through_an_open_group_loses_no_count(tmp_path: Path) -> None:
    """Frames that refer to what was cut away are in the file and in decord's count, and cannot be shown."""
    whole, cut = encode(tmp_path / "whole.mp4", total=100, options=OPEN), tmp_path / "cut.mp4"
    with av.open(str(whole)) as source, av.open(str(cut), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        keys = 0
        for packet in source.demux(video=0):
            keys += packet.is_keyframe
            if packet.dts is not None and keys > 1:
                packet.stream = stream
                target.mux(packet)
    for backend in BACKENDS:
        assert numbers(read_frames(cut, 100, backend=backend)) == list(range(24, 100))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_title_that_is_not_utf8_does_not_matter(tmp_path: Path, backend: str) -> None:
    sound, path = tmp_path / "sound.mp4", tmp_path / "latin.mp4"
    with av.open(str(encode(tmp_path / "clip.mp4", 50, options=CLOSED))) as source, av.open(str(sound), "w") as target:
        target.metadata["title"] = "one cafe"
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    content = sound.read_bytes()
    path.write_bytes(content.replace(b"one cafe", "one caf\xe9".encode("latin-1")))
    with pytest.raises(UnicodeDecodeError), av.open(str(path)):
        pass
    for options in ({}, {"size": 32, "resizing": "decoder"}):
        expected = read_frames(sound, 3, backend=backend, **options)
        np.testing.assert_array_equal(read_frames(path, 3, backend=backend, **options), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_frame_a_second(tmp_path: Path, backend: str) -> None:
    path = encode(tmp_path / "clip.mp4", total=130, options=CLOSED)
    assert numbers(read_frames(path, 12, frames_per_second=1, backend=backend)) == [0, 24, 48, 72, 96, 120]
    assert numbers(read_frames(path, 4, frames_per_second=2, slicing="tail", backend=backend)) == [84, 96, 108, 120]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["clip.mp4", "clip.webm"])
def test_one_frame_a_second_at_a_variable_rate(tmp_path: Path, name: str, backend: str) -> None:
    """5 s at 30 fps, then 10 s at 5 fps: the frame that is shown at each second, whatever the average rate."""
    times = [33 * number for number in range(150)]
    times += [times[-1] + 200 * number for number in range(1, 51)]  # ms
    path, unit = tmp_path / name, Fraction(1, 1000)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264" if name.endswith("mp4") else "libvpx-vp9", rate=30)
        stream.width, stream.height, stream.pix_fmt = SIDE, SIDE, "yuv420p"
        stream.time_base = stream.codec_context.time_base = unit
        stream.options = CLOSED if name.endswith("mp4") else VP9
        for time, picture in zip(times, numbered(200), strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = time, unit
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    shown = [max(number for number in range(200) if times[number] <= 1000 * second) for second in range(15)]
    assert numbers(read_frames(path, 20, frames_per_second=1, backend=backend)) == shown
    assert numbers(read_frames(path, 3, frames_per_second=1, slicing="tail", backend=backend)) == shown[-3:]


def test_unknown_backend(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="decord, pyav"):
        read_frames(tmp_path / "clip.mp4", 4, backend="opencv")


def test_resized_like_clip(tmp_path: Path) -> None:
    """As torchvision's Resize(bicubic) and CenterCrop, which CLIP's own preprocessing is made of."""
    from PIL import Image
    from torchvision.transforms import CenterCrop, InterpolationMode, Resize

    rng = np.random.default_rng(0)
    for height, width in ((61, 97), (97, 61), (32, 50), (20, 20)):
        frame = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        resized = Resize(32, InterpolationMode.BICUBIC)(Image.fromarray(frame))
        np.testing.assert_array_equal(resize_and_crop(frame, 32), np.asarray(CenterCrop(32)(resized)))
    path = encode(tmp_path / "clip.mp4", total=5)
    assert read_frames(path, 3, size=32).shape == (3, 32, 32, 3)
    assert read_frames(path, 3).shape == (3, SIDE, SIDE, 3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["clip.mp4", "clip.avi"])  # the second has no index to seek by
def test_scaled_by_the_decoder(tmp_path: Path, backend: str, name: str) -> None:
    """The same frames, and on a smooth picture nearly the same pixels, none of them ever at the file's size."""
    path, (width, height) = tmp_path / name, (200, 120)
    across = np.linspace(0, 200, width)[None, :, None] + np.linspace(0, 40, height)[:, None, None]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264" if name.endswith("mp4") else "mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(20):
            picture = np.broadcast_to(across * (0.5 + number / 40), (height, width, 3)).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
        container.mux(stream.encode())
    exact = read_frames(path, 4, size=48, backend=backend)
    scaled = read_frames(path, 4, size=48, resizing="decoder", backend=backend)
    assert scaled.shape == exact.shape == (4, 48, 48, 3)
    assert np.abs(scaled.astype(int) - exact).mean() < 2
    made = BACKENDS[backend if name.endswith("mp4") else "pyav"](path, np.array([0, 9]), timeline(path), 48)
    assert made.shape == (2, 48, 80, 3)
    with pytest.raises(ValueError, match="pillow, decoder"):
        read_frames(path, 4, size=48, resizing="opencv")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_files(tmp_path: Path, kind: str, backend: str) -> None:
    make, reason = BAD_FILES[kind]
    path = tmp_path / "bad.mp4"
    make(path)
    with pytest.raises(VideoError, match=reason) as caught:
        read_frames(path, 12, backend=backend)
    assert caught.value.path == path
    assert str(path) in str(caught.value)


def test_video_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(VideoError("clip.mp4", "it is broken")))
    assert (error.path, error.reason) == (Path("clip.mp4"), "it is broken")


def test_without_decord_pyav_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = encode(tmp_path / "clip.mp4", total=20)
    monkeypatch.setitem(__import__("sys").modules, "decord", None)
    with pytest.warns(UserWarning, match=r"decord is not installed: videos are read with PyAV instead$"):
        assert numbers(read_frames(path, 20)) == list(range(20))


def test_whatever_ffmpeg_says_is_a_video_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in opening, seeking and converting, where a file that was whole a moment ago fails."""
    path = encode(tmp_path / "a.mp4", 8)

    def failing(*arguments: object, **options: object) -> None:
        raise av.InvalidDataError(1, "broken")

    line = timeline(path)
    monkeypatch.setattr(av, "open", failing)
    with pytest.raises(VideoError, match="FFmpeg failed: InvalidDataError"):
        BACKENDS["pyav"](path, np.array([0]), line, None)

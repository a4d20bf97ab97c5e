from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from msrvtt_folder import TEST, TRAIN, write_sound
from video_files import audio_only


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with MSR-VTT's files, to read only; tests that write copy it."""
    root = tmp_path_factory.mktemp("sound")
    write_sound(root)
    return root


@pytest.fixture
def damaged(sound: Path, tmp_path: Path) -> Path:
    """The same with a training video without pictures, one that is missing, and a test video of no bytes."""
    root = tmp_path / "damaged"
    shutil.copytree(sound / "msrvtt", root / "msrvtt", ignore=shutil.ignore_patterns("frames"))
    videos = root / "msrvtt" / "videos"
    audio_only(videos / f"{TRAIN[0]}.mp4")
    (videos / f"{TRAIN[4]}.mp4").unlink()
    (videos / f"{TEST[1]}.mp4").write_bytes(b"")
    return root

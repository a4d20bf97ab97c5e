"""The pictures of a report, of items that have none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eval.pictures import thumbnail_uris
from retrieval.evaluate import Encoded
from retrieval.showcase import save_showcase
from training import RunFolder


class Clips:
    captions = ("nothing to see", "two frames")
    image_of_caption = np.arange(2)

    def __len__(self) -> int:
        return 2

    def thumbnails(self, index: int) -> list[Image.Image]:
        return [Image.new("RGB", (9, 9))] * 2 * index


def test_a_clip_without_frames_is_a_grey_square_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    save_showcase(RunFolder(tmp_path), Clips(), Encoded(np.eye(2, dtype=np.float32), np.eye(2, dtype=np.float32)))
    assert [len(thumbnail_uris(tmp_path / "thumbnails", item)) for item in range(2)] == [1, 2]
    assert "1 of 2 pictures for the report cannot be read" in capsys.readouterr().out

"""Conversions into a folder that another process writes: one at a time, and nobody's features are lost."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from region_folders import features_of, write_folder
from tsv_files import SPLITS, regions, row, write_karpathy, write_tsv

from retrieval.regions.feature_file import FeatureFile
from retrieval.regions.verify import to_float16

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import convert_regions


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set when a conversion writes features, for which it then takes its time."""
    begun, write = threading.Event(), FeatureFile.write

    def slowly(file: FeatureFile, row: int, block: np.ndarray) -> None:
        begun.set()
        time.sleep(0.1)
        write(file, row, block)

    monkeypatch.setattr(FeatureFile, "write", slowly)
    return begun


def twice(convert: Callable[[], object], begun: threading.Event, error: type[BaseException], message: str) -> None:
    """Call `convert` while another thread is at it; the second call has to end in an error."""
    first = threading.Thread(target=convert)
    first.start()
    assert begun.wait(10)
    with pytest.raises(error, match=message):
        convert()
    first.join()


def test_a_second_copy_to_float16_waits_and_leaves_the_first_alone(tmp_path: Path, begun: threading.Event) -> None:
    source, output = tmp_path / "whole", tmp_path / "half"
    write_folder(source)
    twice(lambda: to_float16(source, output), begun, ValueError, r"already holds dev_ims\.npy, test_ims\.npy, train_im")
    for number, (split, count) in enumerate((("train", 24), ("dev", 8), ("test", 6))):
        written = np.load(output / f"{split}_ims.npy")
        assert np.array_equal(written, features_of(count, seed=number).astype(np.float16))


def tsv_arguments(folder: Path, output: Path) -> list[str]:
    source = write_tsv(folder / "a.tsv", [row(n, regions(n)) for n in (9, 4, 2, 11)])
    split_file = write_karpathy(folder / "flickr.json")
    return ["tsv", str(source), "--karpathy", str(split_file), "--output", str(output)]


def check_converted(output: Path) -> None:
    for split, numbers in SPLITS.items():
        assert np.array_equal(np.load(output / f"{split}_ims.npy"), np.stack([regions(n) for n in numbers]))


def test_a_second_conversion_waits_and_leaves_the_first_alone(
    tmp_path: Path, begun: threading.Event, capsys: pytest.CaptureFixture
) -> None:
    output = tmp_path / "flickr30k"
    call = tsv_arguments(tmp_path, output)
    twice(lambda: convert_regions.main(call), begun, SystemExit, "2")
    assert "already holds dev_ims.npy" in capsys.readouterr().err
    check_converted(output)


def test_a_conversion_waits_for_an_extraction_of_one_split(tmp_path: Path) -> None:
    output = tmp_path / "flickr30k"
    output.mkdir()
    call = tsv_arguments(tmp_path, output)
    with FileLock(output / "test_ims.npy.lock"):  # as an extraction holds it
        waiting = threading.Thread(target=convert_regions.main, args=(call,))
        waiting.start()
        waiting.join(0.5)
        assert waiting.is_alive() and not list(output.glob("*_ims.npy"))
    waiting.join(10)
    check_converted(output)


def test_an_extraction_that_was_killed_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output = tmp_path / "flickr30k"
    output.mkdir()
    for ending in ("partial", "journal"):
        (output / f"train_ims.npy.{ending}").write_text("hours of work")
    with pytest.raises(SystemExit, match="2"):
        convert_regions.main(tsv_arguments(tmp_path, output))
    assert "already holds train_ims.npy.journal" in capsys.readouterr().err
    assert (output / "train_ims.npy.partial").read_text() == "hours of work"

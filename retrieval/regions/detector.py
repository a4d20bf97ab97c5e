"""Region features of any picture, from torchvision's Faster R-CNN (ResNet-50 FPN, Ren et al., NIPS 2015).

A region is a proposal; its feature is what the box head puts out for it (fc7, after the rectifier: 1,024 numbers >= 0).
Which regions an image gets is decided as in bottom-up attention: every proposal has its best class's score, suppression
by class drops what overlaps a better one, and the best are taken. These are other features than bottom-up attention's
(2,048 numbers of a ResNet-101 trained on Visual Genome with attributes), and they give other results.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from adapters.torchvision_cpu import use_cpu_kernels

CLASSES = 91  # of torchvision's COCO weights, background included


@dataclass(frozen=True, kw_only=True)
class BoxChoice:
    """How many regions of an image to keep.

    Args:
        fewest: at least so many, whatever their scores.
        most: at most so many. Equal to `fewest` gives the published layout with a fixed number.
        score: between the two, those that reach this score; bottom-up attention's threshold is 0.2.
    """

    fewest: int = 36
    most: int = 36
    score: float = 0.2

    def __post_init__(self) -> None:
        if not 1 <= self.fewest <= self.most or not 0 <= self.score < 1:
            raise ValueError(f"boxes need 1 <= fewest <= most and 0 <= score < 1, but got {self}")

    @property
    def fixed(self) -> bool:
        return self.fewest == self.most


def faster_rcnn(weights: Path | None, *, size: int = 800) -> nn.Module:
    """The detector in evaluation mode, with the weights of a file.

    Args:
        weights: a state dict (.pth, read without unpickling) or .safetensors of `fasterrcnn_resnet50_fpn`, with any
            number of classes; None leaves it random, of use to nothing but tests.
        size: pixels of a picture's shorter side; the longer one is limited to 5 / 3 of it, as 1,333 is to 800.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds something else.
    """
    use_cpu_kernels()
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
    from torchvision.ops.misc import FrozenBatchNorm2d

    tensors = None if weights is None else read_weights(weights)
    classes = CLASSES if tensors is None else len(tensors.get("roi_heads.box_predictor.cls_score.bias", range(CLASSES)))
    backbone = resnet_fpn_backbone(backbone_name="resnet50", weights=None, trainable_layers=0)
    model = FasterRCNN(backbone, num_classes=classes, min_size=size, max_size=round(size * 5 / 3))
    for module in model.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.eps = 0.0  # torchvision's weights were trained so
    if tensors is not None:
        try:
            model.load_state_dict(tensors)
        except RuntimeError as error:
            first = " ".join(str(error).split())[:300]
            raise ValueError(f"{weights} does not fit torchvision's fasterrcnn_resnet50_fpn: {first}") from None
    return model.eval()


def read_weights(path: Path) -> dict[str, Tensor]:
    """A state dict from .safetensors or from a .pth that holds tensors alone; nothing is unpickled."""
    if not path.is_file():
        raise FileNotFoundError(f"--weights {path} does not exist; expected a state dict (.pth) or .safetensors file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each library has errors of its own for a damaged file
        first = str(error).partition("\n")[0]
        raise ValueError(f"{path} cannot be read as a state dict or .safetensors file: {first}") from None
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} holds {type(content).__name__}, expected a state dict: names and tensors alone")
    return content


@torch.inference_mode()
def region_features(model: nn.Module, picture: Image.Image, choice: BoxChoice) -> np.ndarray:
    """Features (K, 1024) float32 of the regions that `choice` keeps, best first.

    They are computed where the model's weights are.

    Where suppression leaves too few, the best of what it dropped come next; a picture with fewer proposals than
    `choice.fewest` repeats them from the best on.
    """
    detector, device = cast(Any, model), next(model.parameters()).device
    pixels = torch.from_numpy(np.array(picture.convert("RGB"))).to(device).permute(2, 0, 1).float() / 255
    images, _ = detector.transform([pixels])
    maps = detector.backbone(images.tensors)
    proposals, _ = detector.rpn(images, maps)
    if not len(proposals[0]):  # a picture of a few pixels: all of it is the one region
        height, width = images.image_sizes[0]
        proposals = [torch.tensor([[0.0, 0.0, width, height]], device=device)]
    heads = detector.roi_heads
    features = heads.box_head(heads.box_roi_pool(maps, proposals, images.image_sizes))  # (P, 1024)
    logits, deltas = heads.box_predictor(features)
    scores, classes = logits.softmax(dim=-1)[:, 1:].max(dim=-1)  # without the background
    boxes = heads.box_coder.decode(deltas, proposals)[torch.arange(len(classes), device=device), classes + 1]
    order = best_first(boxes, scores, classes, images.image_sizes[0], heads.nms_thresh)
    good = int((scores[order.kept] >= choice.score).sum())
    count = min(max(good, choice.fewest), choice.most)
    ranked = torch.cat([order.kept, order.dropped])
    return features[ranked[torch.arange(count, device=device) % len(ranked)]].cpu().numpy()


@dataclass(frozen=True)
class Ranking:
    """Positions of boxes, best first: those that suppression by class keeps, and those that it drops."""

    kept: Tensor
    dropped: Tensor


def best_first(boxes: Tensor, scores: Tensor, classes: Tensor, size: tuple[int, int], overlap: float) -> Ranking:
    """Rank boxes (P, 4) with their best class and its score, (P,) each, in a picture of `size` (height, width)."""
    from torchvision.ops import batched_nms, clip_boxes_to_image

    kept = batched_nms(clip_boxes_to_image(boxes, size), scores, classes, overlap)
    order = scores.argsort(descending=True, stable=True)
    return Ranking(kept, order[~torch.isin(order, kept)])


def describe_detector(weights: Path | None, choice: BoxChoice, size: int) -> str:
    """One line that says what features depend on; it becomes part of a run's preprocessing."""
    if weights is None:
        network = "random weights"
    else:
        with weights.open("rb") as file:
            network = f"weights {weights.name} (SHA-256 {hashlib.file_digest(file, 'sha256').hexdigest()[:16]})"
    number = str(choice.most) if choice.fixed else f"{choice.fewest} to {choice.most} (score {choice.score:g})"
    return f"torchvision Faster R-CNN ResNet-50 FPN, fc7 of the {number} best boxes, {size} px, {network}"

"""Let timm and open_clip be imported beside a CPU-only torch, and torchvision's detectors run there.

All need torchvision. The registry's torchvision wheel for Linux is linked against CUDA: beside a CPU build of torch
its compiled operators do not load, and torchvision then fails on import because it describes operators that nobody
has declared ("operator torchvision::nms does not exist", pytorch/vision #9085). Declaring them is enough for everything
in torchvision that is written in Python. Faster R-CNN calls two of them, `nms` and `roi_align`: `use_cpu_kernels` gives
these the ones below, which compute what the compiled ones do.
"""

from __future__ import annotations

import importlib.util
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor

_declared: list[torch.library.Library] = []  # a Library undeclares its operators when it is collected


def declare_missing_operators() -> bool:
    """Declare torchvision's `nms`, `qnms` and `roi_align` if it is installed and its compiled ones cannot be loaded.

    Returns:
        Whether they had to be declared. Calling it again does nothing.
    """
    spec = importlib.util.find_spec("torchvision")
    if _declared or torch.version.cuda is not None or spec is None or spec.origin is None:
        return False
    for compiled in Path(spec.origin).parent.glob("_C*"):
        try:
            torch.ops.load_library(str(compiled))
            return False
        except OSError:
            continue
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define(
        "roi_align(Tensor input, Tensor rois, float spatial_scale, int pooled_height, int pooled_width, "
        "int sampling_ratio, bool aligned) -> Tensor"
    )
    library.impl("nms", nms, "CPU")
    library.impl("roi_align", roi_align, "CompositeImplicitAutograd")  # made of differentiable operators
    _declared.append(library)
    return True


def use_cpu_kernels() -> None:
    """Let torchvision call `nms` and `roi_align` where `declare_missing_operators` had to stand in; else nothing."""
    if _declared:
        # torchvision asks these before each call; operators that are still missing end in torch's own error
        for module in ("torchvision.extension", "torchvision.ops.roi_align"):
            setattr(import_module(module), "_has_ops", lambda: True)  # noqa: B010  (mypy knows it as a function)


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Non-maximum suppression: positions of the boxes that no better kept one overlaps too much, best first.

    Args:
        boxes: (N, 4) as (x1, y1, x2, y2).
        scores: (N,); of equal ones the first is the better.
        iou_threshold: intersection over union from which on, exclusively, a box is dropped.
    """
    order = scores.argsort(descending=True, stable=True)
    left, top, right, bottom = boxes[order].unbind(1)
    areas = (right - left) * (bottom - top)
    kept, rest = [], torch.arange(len(order), device=boxes.device)
    while len(rest):
        best, rest = rest[0], rest[1:]
        kept.append(best)
        width = (torch.minimum(right[best], right[rest]) - torch.maximum(left[best], left[rest])).clamp(min=0)
        height = (torch.minimum(bottom[best], bottom[rest]) - torch.maximum(top[best], top[rest])).clamp(min=0)
        common = width * height
        rest = rest[~(common / (areas[best] + areas[rest] - common) > iou_threshold)]  # 0 / 0 drops nothing
    return order[torch.stack(kept)] if kept else order


def roi_align(
    input: Tensor,
    rois: Tensor,
    spatial_scale: float,
    pooled_height: int,
    pooled_width: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """RoIAlign (He et al., ICCV 2017): the mean of bilinear samples in each cell of a grid over each box.

    A sample's weights are a product of one for the row and one for the column, and so is their mean over a cell. Hence
    a box is two small matrix products, on the part of the map that it covers.

    Args:
        input: maps (B, C, H, W).
        rois: (K, 5): item, x1, y1, x2, y2, in pixels of the picture.
        spatial_scale: of the maps against the picture.
        pooled_height, pooled_width: cells.
        sampling_ratio: samples a cell along each axis; 0 or less: as many as it covers pixels of the map, rounded up.
        aligned: whether a pixel's value is at its centre; if not, boxes are at least one pixel wide and high.

    Returns:
        (K, C, pooled_height, pooled_width).
    """
    edges = rois[:, 1:] * spatial_scale - (0.5 if aligned else 0.0)
    sizes = edges[:, 2:] - edges[:, :2]
    sizes = sizes if aligned else sizes.clamp(min=1.0)
    pooled = [input.new_zeros(0, input.shape[1], pooled_height, pooled_width)]
    for item, (left, top), (width, height) in zip(rois[:, 0].long().tolist(), edges[:, :2], sizes, strict=True):
        rows, over_rows = _cells(top, height, pooled_height, sampling_ratio, input.shape[2])
        columns, over_columns = _cells(left, width, pooled_width, sampling_ratio, input.shape[3])
        pooled.append((over_rows @ input[item, :, rows, columns] @ over_columns.T)[None])
    return torch.cat(pooled)


def _cells(start: Tensor, size: Tensor, cells: int, samples: int, length: int) -> tuple[slice, Tensor]:
    """Along one axis of a map of `length`: the part that is read, and its weights (cells, part) in each cell's mean."""
    step = size / cells
    samples = samples if samples > 0 else int(step.ceil())
    if samples < 1:
        return slice(0, 1), start.new_zeros(cells, 1)
    cell, sample = torch.arange(cells, device=start.device)[:, None], torch.arange(samples, device=start.device)
    points = start + cell * step + (sample + 0.5) * step / samples  # (cells, samples)
    share = ((points >= -1) & (points <= length)).to(start.dtype) / samples
    points = points.clamp(0, length - 1)
    below = points.floor().long()
    above, fraction = (below + 1).clamp(max=length - 1), points - below
    first, last = int(below.min()), int(above.max())
    weights = start.new_zeros(cells, last + 1 - first)
    weights.scatter_add_(1, below - first, (1 - fraction) * share)
    weights.scatter_add_(1, above - first, fraction * share)
    return slice(first, last + 1), weights

"""Let timm and open_clip be imported beside a CPU-only torch.

Both import torchvision. The registry's torchvision wheel for Linux is linked against CUDA: beside a CPU build of torch
its compiled operators do not load, and torchvision then fails on import because it describes two operators that nobody
has declared ("operator torchvision::nms does not exist", pytorch/vision #9085). Declaring them, without kernels, is
enough for everything in torchvision that is written in Python; calling them still ends in torch's own error.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

_declared: list[torch.library.Library] = []  # a Library undeclares its operators when it is collected


def declare_missing_operators() -> bool:
    """Declare torchvision's `nms` and `qnms` if it is installed and its compiled operators cannot be loaded.

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
    _declared.append(library)
    return True

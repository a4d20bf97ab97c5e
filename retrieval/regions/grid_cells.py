"""Region features of pictures: the cells of a convolutional network's last map, reduced by a PCA.

VSE-infinity pools a set of vectors an image. Its detector's 36 boxes are replaced by the 6 x 6 cells of
EfficientNet-Lite0 at 192 px, which a CPU computes in a minute for thousands of pictures.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from tqdm.auto import tqdm

from training.hardware import cores

if TYPE_CHECKING:
    from timm.models import EfficientNet

Network = TypeVar("Network", bound=nn.Module)

BATCH = 4  # pictures; the first layers' maps of more do not fit a core's cache, and 32 take twice the time of 4


class Pca(NamedTuple):
    """A projection ``(x - mean) @ components``: ``mean (D,)``, ``components (D, d)``, both float32."""

    mean: np.ndarray
    components: np.ndarray


@torch.inference_mode()
def cells(model: EfficientNet, pictures: np.ndarray) -> Tensor:
    """``(B, H, W, 3)`` uint8 -> ``(B, H W / 32^2, D)`` float32, row by row, normalised by mean = std = 0.5."""
    batch = torch.from_numpy(pictures).permute(0, 3, 1, 2).float()  # channels last in memory, as uint8 pictures are
    return model.forward_features(batch * (2 / 255) - 1).flatten(2).transpose(1, 2)


def region_features(model: EfficientNet, pictures: Sequence[np.ndarray], label: str) -> np.ndarray:
    """The cells of every picture, ``(n, K, D)`` float16, with a progress bar that says ``label``.

    One thread a core, each with its own batches: several threads on one batch wait for each other at every layer, which
    takes twice as long and, on a busy machine, thirty times. Batch norms are folded into the convolutions before them.

    Args:
        model: timm network in evaluation mode with ``forward_features``; it is not changed.
        pictures: ``(H, W, 3)`` uint8, all of one size.
        label: what the progress bar says.
    """
    fast = fold_batch_norms(copy.deepcopy(model))
    fast.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch has it, its stub does not
    starts = range(0, len(pictures), BATCH)

    def extract(start: int) -> np.ndarray:
        return cells(fast, np.stack(pictures[start : start + BATCH])).half().numpy()

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(cores()) as pool, tqdm(total=len(pictures), desc=label, unit="picture") as bar:
            found = []
            for part in pool.map(extract, starts):
                found.append(part)
                bar.update(len(part))
    finally:
        torch.set_num_threads(threads)
    return np.concatenate(found)


def fold_batch_norms(model: Network) -> Network:
    """Fold each batch norm into the convolution right before it, in place; the same function up to rounding."""
    for parent in list(model.modules()):
        children = list(parent.named_children())
        for (name, convolution), (norm_name, norm) in pairwise(children):
            if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(parent, name, fuse_conv_bn_eval(convolution, norm))
                setattr(parent, norm_name, getattr(norm, "act", nn.Identity()))  # timm's norms carry the activation
    return model


def fit_pca(features: np.ndarray, dimensions: int, images: int = 750) -> Pca:
    """Principal components of ``features (n, K, D)``, from at most ``images`` evenly spaced ones of them.

    Each component's largest entry is positive, so that machines agree on its sign.
    """
    chosen = np.unique(np.linspace(0, len(features) - 1, min(images, len(features))).round().astype(int))
    rows = torch.from_numpy(features[chosen].reshape(-1, features.shape[-1])).float()
    mean = rows.mean(dim=0)
    rows -= mean
    _, vectors = torch.linalg.eigh((rows.T @ rows).double())  # ascending
    components = vectors.flip(1)[:, :dimensions]
    largest = components.gather(0, components.abs().argmax(dim=0, keepdim=True))
    return Pca(mean.numpy(), (components * largest.sign()).float().numpy())


def project(features: np.ndarray, pca: Pca) -> np.ndarray:
    """``(n, K, D)`` -> ``(n, K, d)``, float16 as they are stored."""
    mean, components = torch.from_numpy(pca.mean), torch.from_numpy(pca.components)
    reduced = np.empty((*features.shape[:-1], components.shape[1]), dtype=np.float16)
    for start in range(0, len(features), 256):  # float32 copies of 256 images are 47 MB
        part = torch.from_numpy(features[start : start + 256]).float()
        reduced[start : start + 256] = ((part - mean) @ components).half().numpy()
    return reduced

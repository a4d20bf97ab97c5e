"""What the frozen blocks make of every image, computed once and kept on the disk."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from classification.data import ClassificationDataset
from training.hardware import compute_device


def cached_tokens(data: ClassificationDataset, frozen: nn.Module, root: Path) -> Tensor:
    """The tokens of every image of `data`, ``(n, T, width)`` float32, in the data's order.

    They are kept in ``<root>/<data>/tokens-<key>.safetensors``; the key is a fingerprint of the data and of the frozen
    weights. Two processes at once compute them once, and a killed one leaves nothing that looks finished. 1,797 digits
    after 8 blocks of ViT-S/14 at 56 px are 17 tokens of 384 numbers each: 47 MB.

    Args:
        data: the images.
        frozen: a timm ViT without its last blocks and norm, in evaluation mode (`classification.models.split_vit`).
        root: folder of all data sets.
    """
    path = Path(root) / data.name / f"tokens-{_key(data, frozen)}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        with FileLock(path.with_suffix(".lock")):
            if not path.is_file():  # another process may have made it while this one waited
                partial = path.with_suffix(".partial")
                save_file({"tokens": compute_tokens(data, frozen)}, partial)
                os.replace(partial, path)
    return load_file(path)["tokens"]


@torch.inference_mode()
def compute_tokens(data: ClassificationDataset, frozen: Any, batch_size: int = 64) -> Tensor:
    """The tokens of every image of `data`, ``(n, T, width)`` float32, computed where this process trains."""
    device = compute_device()
    frozen.to(device)
    batches = np.split(np.arange(len(data.labels)), range(batch_size, len(data.labels), batch_size))
    progress = tqdm(batches, desc=f"frozen blocks on {data.name}", unit="batch")
    return torch.cat([frozen.forward_features(data.images(indices).to(device)).cpu() for indices in progress])


def _key(data: ClassificationDataset, frozen: nn.Module) -> str:
    digest = hashlib.sha256(data.fingerprint.encode())
    for name, tensor in frozen.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + tensor.cpu().numpy().tobytes())
    return digest.hexdigest()[:20]


class LabelledTokens(Dataset):
    """One split: an item is {"tokens": (T, width), "labels": ()}.

    Args:
        tokens: ``(n, T, width)`` of all images.
        labels: ``(n,)`` int64 of all images.
        indices: of the split's images.
    """

    def __init__(self, tokens: Tensor, labels: np.ndarray, indices: np.ndarray) -> None:
        self.tokens = tokens[torch.from_numpy(indices)]
        self.labels = torch.from_numpy(labels[indices])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"tokens": self.tokens[index], "labels": self.labels[index]}

    def batches(self, size: int, *, first: int | None = None) -> Iterator[dict[str, Tensor]]:
        """What a model takes, in the split's order: {"tokens": (B, T, width)}; of the `first` images, or of all."""
        for tokens in self.tokens[:first].split(size):
            yield {"tokens": tokens}

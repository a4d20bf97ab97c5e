"""What the frozen blocks make of every image, computed once and kept on the disk."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from classification.data import ClassificationDataset
from classification.data.listed import ListedImages
from training.hardware import compute_device


def cached_tokens(data: ClassificationDataset, frozen: nn.Module, root: Path) -> Path:
    """The .npy file with the tokens of every image of `data`, ``(n, T, width)`` float32, in the data's order.

    It is ``<root>/<data>/tokens-<key>.npy``; the key is a fingerprint of the data, of the sizes of all its files and of
    the frozen weights. Two processes at once compute it once, and a killed one leaves nothing that looks finished.
    1,797 digits after 8 blocks of ViT-S/14 at 56 px are 17 tokens of 384 numbers each: 47 MB. The 74,728 images of
    dsprites at 224 px are 29.5 GB: the file is written batch by batch and read row by row, and never held in memory.

    Args:
        data: the images.
        frozen: a timm ViT without its last blocks and norm, in evaluation mode (`classification.models.split_vit`).
        root: folder of all data sets.

    Raises:
        ValueError: the disk has no room for the tokens, or the file that is there is damaged.
    """
    path = Path(root) / data.name / f"tokens-{_key(data, frozen)}.npy"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        with FileLock(path.with_suffix(".lock")):
            if not path.is_file():  # another process may have made it while this one waited
                _write(path, data, frozen)
    open_tokens(path)  # a damaged one is told here, before anything trains
    return path


@torch.inference_mode()
def compute_tokens(data: ClassificationDataset, frozen: Any, batch_size: int = 64) -> Iterator[np.ndarray]:
    """The tokens of a batch of images of `data` after the other, ``(B, T, width)`` float32.

    They are computed where this process trains.
    """
    device = compute_device()
    frozen.to(device)
    batches = np.split(np.arange(len(data.labels)), range(batch_size, len(data.labels), batch_size))
    for indices in tqdm(batches, desc=f"frozen blocks on {data.name}", unit="batch"):
        yield frozen.forward_features(data.images(indices).to(device)).cpu().contiguous().numpy()


def open_tokens(path: Path) -> np.ndarray:
    """The content of a file of `cached_tokens`, memory-mapped: rows are read from the disk when they are asked for.

    Raises:
        ValueError: it is no .npy file, or ends too early.
    """
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} cannot be read ({error}); delete it, and it is computed again") from None


def _write(path: Path, data: ClassificationDataset, frozen: nn.Module) -> None:
    partial = path.with_suffix(".partial")
    partial.unlink(missing_ok=True)  # of a process that was killed: it takes room
    batches = compute_tokens(data, frozen)
    first = next(batches)
    shape = (len(data.labels), *first.shape[1:])
    needed, free = shape[0] * first[0].nbytes, shutil.disk_usage(path.parent).free
    if needed > free:
        raise ValueError(
            f"what the frozen blocks put out for the {shape[0]:,} images of data={data.name}, {shape[1]} tokens of "
            f"{shape[2]} numbers each, takes {needed / 1e9:.1f} GB, and {path.parent} has {free / 1e9:.1f} GB; train a "
            f"whole model, which keeps nothing (model=vit_b16), or make room, or link {path.parent} to a larger disk"
        )
    header = np.lib.format.header_data_from_array_1_0(first) | {"shape": shape}
    try:
        with partial.open("wb") as file:  # not through a map, where a full disk ends the process without an exception
            np.lib.format.write_array_header_1_0(file, header)
            for tokens in chain([first], batches):
                file.write(tokens.data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _key(data: ClassificationDataset, frozen: nn.Module) -> str:
    digest = hashlib.sha256(data.fingerprint.encode())
    if isinstance(data, ListedImages):  # their fingerprint reads a sample of the files; others may have been replaced
        for name in data.files:
            digest.update(f"{(data.folder.images / name).stat().st_size} ".encode())
    for name, tensor in frozen.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + tensor.cpu().numpy().tobytes())
    return digest.hexdigest()[:20]


class LabelledTokens(Dataset):
    """One split: an item is {"tokens": (T, width), "labels": ()}; the tokens are read from the disk with it.

    Args:
        file: the tokens of all images (`cached_tokens`).
        labels: ``(n,)`` int64 of all images.
        indices: of the split's images.
    """

    def __init__(self, file: Path, labels: np.ndarray, indices: np.ndarray) -> None:
        self.file, self.indices = file, indices
        self.labels = torch.from_numpy(labels[indices])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, item: int) -> dict[str, Tensor]:
        return {"tokens": torch.tensor(self._tokens[self.indices[item]]), "labels": self.labels[item]}

    def batches(self, size: int, *, first: int | None = None) -> Iterator[dict[str, Tensor]]:
        """What a model takes, in the split's order: {"tokens": (B, T, width)}; of the `first` images, or of all."""
        for indices in torch.from_numpy(self.indices[:first]).split(size):
            yield {"tokens": torch.tensor(self._tokens[indices.numpy()])}

    @cached_property
    def _tokens(self) -> np.ndarray:
        return np.asarray(open_tokens(self.file))

    def __getstate__(self) -> dict[str, Any]:
        """Without the mapped file: pickling it for the process of a data loader would copy all tokens."""
        return {name: value for name, value in self.__dict__.items() if name != "_tokens"}

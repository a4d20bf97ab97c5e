"""One split as images that are decoded when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from classification.data import ClassificationDataset


class LabelledImages(Dataset):
    """One split: an item is {"images": (3, H, W), "labels": ()}.

    Args:
        data: the images.
        indices: of the split's images.
        augmented: give what the data's augmentation makes of an image, another thing in each epoch, instead of the
            image itself.
        seed: of the augmentation, a function of (seed, epoch, image): workers and a resumed run see the same.
        workers: processes that decode for `batches`.
    """

    def __init__(
        self,
        data: ClassificationDataset,
        indices: np.ndarray,
        *,
        augmented: bool = False,
        seed: int = 0,
        workers: int = 0,
    ) -> None:
        self.data, self.indices, self.augmented, self.seed, self.workers = data, indices, augmented, seed, workers
        self.labels = torch.from_numpy(data.labels[indices])
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.indices)

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer, before the workers of an epoch start."""
        self.epoch = epoch

    def __getitem__(self, item: int) -> dict[str, Tensor]:
        index = int(self.indices[item])
        if self.augmented:
            (seed,) = np.random.SeedSequence((self.seed, self.epoch)).generate_state(1).tolist()
            image = self.data.augmented(index, seed)
        else:
            (image,) = self.data.images([index])
        return {"images": image, "labels": self.labels[item]}

    def batches(self, size: int, *, first: int | None = None) -> Iterator[dict[str, Tensor]]:
        """What an evaluation takes, in the split's order and never augmented: {"images": (B, 3, H, W)}.

        Args:
            size: images of a batch, B.
            first: so many first images of the split; None takes all.
        """
        plain = LabelledImages(self.data, self.indices[:first])
        for batch in DataLoader(plain, batch_size=size, num_workers=self.workers):
            yield {"images": batch["images"]}

"""One training step of an adapted ViT, with or without a penalty: what the rows of Table 6 measure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapters import ADAPTERS, LoRA, inject
from benchmarks.measure import Counts, count, resident_peak
from benchmarks.naive_equations import NAIVE
from regularizers import Captured, ReSoRA, capture
from training import KeptCasts

Penalty = Callable[[Captured], Tensor]
WEIGHT = 1e-2


def penalty(name: str) -> Penalty | None:
    """By name: a closed form ("linear"), an equation as printed ("Eq. 7"), or none ("")."""
    printed = dict(NAIVE.values())
    if not name:
        return None
    if name in printed:
        return lambda subspaces: WEIGHT * torch.stack([printed[name](*pair) for pair in subspaces.values()]).mean()
    resora = ReSoRA(name, weight=WEIGHT)
    return lambda subspaces: torch.stack(list(resora(subspaces).values())).sum()


def adapted(adapter: str, model: str, image_size: int) -> nn.Module:
    """A timm ViT with random weights and 100 classes, an adapter in it, its head trained."""
    backbone = timm.create_model(model, num_classes=100, img_size=image_size)
    method = LoRA(rank=8, alpha=8, targets=("q", "k", "v")) if adapter == "lora" else ADAPTERS[adapter]()
    return inject(backbone, method, train=("head",))


class Step:
    """A model in training, AdamW on what trains, and one batch with labels.

    Args:
        model: returns logits.
        inputs: what it is called with.
        labels: (B,).
        precision: bfloat16 runs the forward pass under autocast.
        keep_casts: as the trainer of this suite does.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: tuple[Tensor, ...],
        labels: Tensor,
        precision: torch.dtype = torch.float32,
        keep_casts: bool = False,
    ) -> None:
        self.model, self.inputs, self.labels, self.precision = model.train(), inputs, labels, precision
        self.casts = KeptCasts(model) if keep_casts else None
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-3)
        self.run()  # AdamW makes its state, and B leaves zero, where Eq. 6 and 7 as printed are 0 / 0

    def loss(self, penalty: Penalty | None = None) -> Tensor:
        if penalty is None:
            return self._loss_of_task()
        with capture(self.model) as subspaces:
            loss = self._loss_of_task()
        return loss + penalty(subspaces)

    def _loss_of_task(self) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.precision == torch.bfloat16):
            return F.cross_entropy(self.model(*self.inputs).float(), self.labels)

    def update(self, loss: Tensor) -> None:
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def run(self, penalty: Penalty | None = None) -> None:
        with self.casts or nullcontext():
            self.update(self.loss(penalty))

    def count(self, penalty: Penalty | None = None) -> Counts:
        """Exact counts of one step."""
        with self.casts or nullcontext():
            return count(lambda: self.loss(penalty), self.update, self.tensors())

    def tensors(self) -> Iterator[Tensor]:
        """What is alive between two steps."""
        yield from (*self.model.parameters(), *self.model.buffers(), *self.inputs, self.labels)
        for state in self.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))
        if self.casts:
            yield from self.casts.tensors()


class TrainingStep(Step):
    """A ViT with random weights, an adapter, its head trained, and one batch of noise; float32.

    Args:
        adapter: a name in `ADAPTERS`, with its defaults; "lora" has rank 8 on q, k and v, as in the paper.
        batch: images.
        model: name of a timm ViT.
        image_size: pixels; (image_size / patch)^2 + 1 tokens an image.
    """

    def __init__(self, adapter: str, batch: int, model: str, image_size: int) -> None:
        torch.manual_seed(0)
        images, labels = torch.randn(batch, 3, image_size, image_size), torch.randint(100, (batch,))
        super().__init__(adapted(adapter, model, image_size), (images,), labels)


def account(row: tuple[str, str, int], model: str, image_size: int, threads: int) -> tuple[Counts, int]:
    """Counts of one step, and the resident bytes at its peak, less those of the libraries.

    To be called in a fresh process: a peak never goes down.

    Args:
        row: adapter, penalty and batch.
    """
    torch.set_num_threads(threads)
    libraries = resident_peak()
    adapter, name, batch = row
    step, measure = TrainingStep(adapter, batch, model, image_size), penalty(name)
    step.run(measure)
    resident = resident_peak() - libraries
    return step.count(measure), resident
